"""Checkpoints written from what lies on disk: for other processes, or from a model made elsewhere."""
