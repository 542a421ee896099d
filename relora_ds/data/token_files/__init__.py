"""What lies on disk of a token file: its index, the identity of its contents, its description."""
