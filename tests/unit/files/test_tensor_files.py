"""Safetensors files: the library reads them, equal tensors give equal bytes, the umask rules."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from relora_ds.files.tensors import _NAMES, write_safetensors

METADATA = {"producer": "relora_ds", "format": "pt", "a": "\u00e9\n"}


def tensors() -> dict[str, torch.Tensor]:
    """One of every type, and the shapes that writers get wrong."""
    drawn = {
        f"of {name}": torch.arange(7).to(dtype).reshape(7, 1) for dtype, name in _NAMES.items()
    }
    return drawn | {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "part of another": torch.arange(100, dtype=torch.int32)[10:13],
        "a number": torch.tensor(2.5, dtype=torch.bfloat16),
        "nothing": torch.empty(0, 4),
        "wei\u00dfe \u4e2d": torch.tensor([float("nan"), -0.0, float("inf")]),
        "trained": torch.ones(2, requires_grad=True),
    }


def test_the_library_reads_every_type_and_shape(tmp_path):
    path, expected = tmp_path / "file", tensors()
    write_safetensors(path, expected, METADATA)
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8),
            tensor.detach().contiguous().reshape(-1).view(torch.uint8),
        )
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
    write_safetensors(path, {})
    assert load_file(path) == {}


def test_equal_tensors_give_equal_bytes(tmp_path):
    hashes = set()
    for number in range(20):
        path = tmp_path / str(number)
        turned = dict(reversed(tensors().items())) if number % 2 else tensors()
        metadata = dict(reversed(METADATA.items())) if number % 3 else METADATA
        write_safetensors(path, turned, metadata)
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_the_umasks(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "file", tensors())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_full_disk_is_an_error_with_its_number():
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(Path("/dev/full"), tensors())
