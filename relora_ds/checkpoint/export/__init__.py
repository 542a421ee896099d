"""From a checkpoint to what others load: the dense model, and what goes with it."""
