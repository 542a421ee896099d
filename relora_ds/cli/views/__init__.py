"""Verbs that show something: pictures and reports of runs."""
