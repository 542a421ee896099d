"""Faults at named moments of a run, and what a run promises about each of them."""
