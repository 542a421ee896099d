"""What the tests of this folder run on several ranks, a module per test file."""
