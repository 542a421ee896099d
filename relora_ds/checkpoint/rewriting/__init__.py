"""Checkpoints written anew: for other processes, or from a model that was made elsewhere."""
