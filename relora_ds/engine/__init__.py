"""A model under ZeRO: what drives it, where its state lies, and what methods may do to it."""
