"""A saved model at work: texts from it, tasks of lm-eval, fine-tuning on GLUE."""
