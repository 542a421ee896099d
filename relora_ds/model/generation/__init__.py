"""Text from a model: reading a prompt, and choosing one token after another."""
