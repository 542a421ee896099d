"""Verbs that advise: on a machine, and on run descriptions of other trainers."""
