"""64 bits of the content of many tensors at once, by which replicas are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from relora_ds.numerics.gpu import launch

WIDTH = 4096
"""Words in a row of the table that a tensor is seen as."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`fingerprint` of each tensor, on its device; on a GPU by one launch for each width of
    elements."""
    found: dict[int, torch.Tensor] = {}
    together: dict[torch.device, dict[int, torch.Tensor]] = {}
    for number, tensor in enumerate(tensors):
        words = _integers(tensor)
        if launch.usable(words.device):
            together.setdefault(words.device, {})[number] = words
        else:
            found[number] = _of_words(words)
    for here in together.values():
        from relora_ds.numerics.gpu import fingerprints as kernels  # needs Triton

        values = kernels.fingerprints(list(here.values())).unbind()
        found |= dict(zip(here, values, strict=True))
    return [found[number] for number in range(len(tensors))]


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """64 bits of a tensor's content, as an int64 scalar on its device, without waiting for it.

    Two sums over rows and columns of 64-bit words, each with weights of its own, modulo 2^64: a
    change of any one word always shows.
    """
    return fingerprints([tensor])[0]


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGERS[flat.element_size()])


def _of_words(words: torch.Tensor) -> torch.Tensor:
    per_word = 8 // words.element_size()
    body = words.numel() // (WIDTH * per_word) * WIDTH * per_word
    total = _weighted(words[body:].to(torch.int64))
    if body:
        aligned = words[:body]
        if aligned.data_ptr() % 8 or aligned.storage_offset() % per_word:
            aligned = aligned.clone()
        table = aligned.view(torch.int64).view(-1, WIDTH)
        total = total * 31 + _weighted(table.sum(0)) * 17 + _weighted(table.sum(1))
    return total


def _weighted(values: torch.Tensor) -> torch.Tensor:
    # odd weights: a single change is never lost modulo 2^64
    weights = torch.arange(values.numel(), dtype=torch.int64, device=values.device)
    return (values * (weights * -7046029254386353131 | 1)).sum()
