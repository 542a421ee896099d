"""Full-rank training: the baseline, and the warm start of every adapter method."""

from __future__ import annotations

from relora_ds.config.methods.full import FullConfig
from relora_ds.methods.interface import Method


class Full(Method[FullConfig]):
    """Every weight is trained; the defaults of `Method` are exactly that."""
