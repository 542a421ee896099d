"""Verbs that put a saved model to work: scores, texts, fine-tuning."""
