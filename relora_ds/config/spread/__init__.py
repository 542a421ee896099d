"""Sections on how a run is spread over processes that are far apart."""
