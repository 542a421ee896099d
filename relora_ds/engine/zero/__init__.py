"""Partitioned state: where every slice lies, and what may be done to it."""
