"""Optimizers over flat tensors; they know no DeepSpeed and no method."""
