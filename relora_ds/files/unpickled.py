"""Files that torch unpickles, and tensors that come out: neither may claim more than it has."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

import torch


def check_archive(path: Path) -> None:
    """Make sure that a file claims no more bytes than it has; reading would allocate them.

    Raises:
        OSError: it is no regular file or cannot be read.
        ValueError: it is no archive of stored records.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):  # to open a pipe would block
        raise ValueError("is not a regular file")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if len({record.filename for record in records}) != len(records):
        raise ValueError("holds two records of one name")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("holds compressed records, which are never written")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("claims records that are larger than the file")


def check_tensor(tensor: torch.Tensor) -> None:
    """Make sure that a tensor has memory of its own size; to copy it would allocate the rest.

    Raises:
        ValueError: it is a view that repeats its memory, or of another layout or device.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"holds a tensor without ordinary memory ({tensor.layout})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"holds a tensor of shape {tuple(tensor.shape)} with less memory than that"
        )
