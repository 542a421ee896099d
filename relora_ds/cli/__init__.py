"""Command lines: one module per verb, which parses arguments and calls one function."""
