"""Writing safetensors files, byte by byte the same for the same tensors.

The library reads them. It does not write them here because its writer puts metadata in random
order, so that equal exports differ in their hash; makes every file private to its owner, whatever
the umask says; and reports a full disk in words of its own instead of an OSError with its number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

_ALIGNMENT = 8  # bytes; readers map the file and expect numbers at multiples of their size

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Stream(Protocol):
    """What bytes are appended to, such as a file."""

    def write(self, content: bytes | memoryview, /) -> int: ...


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors of any device and layout; equal arguments give equal files.

    Args:
        path: file to write; an existing one is replaced.
        tensors: by name, of any number of dimensions.
        metadata: text to keep in the header.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as stream:
        stream_safetensors(stream, tensors, metadata)


def stream_safetensors(
    stream: Stream, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Append the bytes of a safetensors file; at most one tensor is copied at a time.

    Args:
        stream: where they go.
        tensors: by name, of any number of dimensions.
        metadata: text to keep in the header.
    """
    # wide types first, as the library has it: then every tensor starts at a multiple of its size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for name in order:
        stream.write(_bytes(tensors[name]).data)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The elements as bytes, uint8 of shape (bytes,)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
