"""From text to data that knows where it was written, and names that were meant. Knows no schema."""
