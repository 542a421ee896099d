"""Sequences of several documents, and the same documents alone."""

from __future__ import annotations

import torch

ROWS = ((4, 9, 1, 3), (2, 15))
"""Tokens of each document of each sequence of 17, its end included."""


def packed(end: int, vocab_size: int) -> torch.Tensor:
    """int64 (2, 17): sequences of whole documents."""
    texts = iter(alone(end, vocab_size))
    return torch.stack([torch.cat([next(texts) for _ in row]) for row in ROWS])


def alone(end: int, vocab_size: int) -> list[torch.Tensor]:
    """The documents, one after the other, each with its end."""
    generator = torch.Generator().manual_seed(5)
    texts = []
    for length in (length for row in ROWS for length in row):
        ids = torch.randint(vocab_size - 1, (length - 1,), generator=generator)
        # every id but the one that ends a document
        texts.append(torch.cat([ids + (ids >= end), torch.tensor([end])]))
    return texts
