"""What islands exchange: gradients before every update, or weights at the end of a round."""
