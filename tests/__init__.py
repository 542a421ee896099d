"""Tests: `unit` in one process, `distributed` on several ranks, `multihost` on several hosts."""
