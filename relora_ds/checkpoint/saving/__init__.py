"""Saving: from a live run to a complete checkpoint, in the foreground or behind the training."""
