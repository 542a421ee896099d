"""Every command of README and documentation, taken from the text and executed."""
