"""Tests on several gloo ranks, and the programs that those ranks run."""
