"""Corpora, tokenizers, token files, and which samples are used when."""
