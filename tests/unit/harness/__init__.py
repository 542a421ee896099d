"""The harness itself: what a fault must never do."""
