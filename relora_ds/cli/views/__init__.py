"""Verbs that show something: texts of a model, pictures and reports of runs."""
