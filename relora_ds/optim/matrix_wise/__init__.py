"""Optimizers that update whole matrices, one file each, and what they share."""
