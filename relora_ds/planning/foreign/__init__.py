"""Runs of other trainers in our words: what their flags mean here, and which mean nothing."""
