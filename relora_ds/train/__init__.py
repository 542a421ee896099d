"""A run from its description to its results: the training loop and what surrounds it."""
