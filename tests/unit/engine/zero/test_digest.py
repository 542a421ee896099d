"""A fingerprint changes with every bit and with the order of what it is taken of."""

from __future__ import annotations

import pytest
import torch

from relora_ds.numerics.batched.fingerprints import fingerprint

SIZES = (1, 7, 8192, 20_001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.int32])
@pytest.mark.parametrize("size", SIZES)
def test_every_element_counts(size: int, dtype: torch.dtype) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(1)).mul(100).to(dtype)
    before = int(fingerprint(values))
    assert int(fingerprint(values.clone())) == before
    width = values.element_size()
    bits = values.view(torch.int32 if width == 4 else torch.int16)
    for at in {0, size // 2, size - 1}:
        bits[at] ^= 1
        assert int(fingerprint(values)) != before
        bits[at] ^= 1
    assert int(fingerprint(values)) == before


def test_order_counts() -> None:
    values = torch.arange(20_000, dtype=torch.float32)
    assert int(fingerprint(values)) != int(fingerprint(values.flip(0)))


def test_slices_need_no_alignment() -> None:
    values = torch.arange(20_001, dtype=torch.float32)
    assert int(fingerprint(values[1:])) == int(fingerprint(values[1:].clone()))
    assert int(fingerprint(values[:0])) == 0
