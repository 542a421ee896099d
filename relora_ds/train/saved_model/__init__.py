"""A saved model at work: texts from it, and tasks of lm-eval."""
