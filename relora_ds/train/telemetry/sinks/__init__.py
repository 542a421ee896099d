"""Where metrics go: console, TensorBoard, Weights & Biases, behind one interface."""
