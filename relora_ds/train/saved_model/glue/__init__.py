"""Fine-tuning of a saved model on tasks of GLUE, and its scores."""
