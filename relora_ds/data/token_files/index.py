"""The index of a token file, checked before anybody takes it on trust."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

import numpy as np

from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.errors import DataError
from relora_ds.files.regular import open_regular

REMEDY = "write it again with tools/prepare_data.py"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document bounds
_MAGIC = b"MMIDIDX\x00\x00"
_CHUNK = 1 << 22  # sequences looked at at once


class IndexHeader(NamedTuple):
    """The fixed part of an index."""

    dtype: np.dtype
    """Type of one token."""
    num_sequences: int
    num_bounds: int
    """Document bounds: one more than there are documents."""


def read_header(prefix: str) -> IndexHeader:
    """The index's header, after checking the sizes that Megatron's reader takes on trust.

    Raises:
        DataError: a file is missing, empty or damaged.
    """
    sizes = {suffix: _file_size(prefix + suffix) for suffix in (".bin", ".idx")}
    name = f"{prefix}.idx"
    with open_regular(name) as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(f"{name}: {len(head)} bytes are no index of a token file; {REMEDY}")
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1:
        raise DataError(f"{name}: not an index of a Megatron token file, version 1; {REMEDY}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if sizes[".idx"] != expected:
        raise DataError(
            f"{name}: {sizes['.idx']} bytes, but {num_sequences} sequences take {expected}; "
            f"{REMEDY}"
        )
    if not num_sequences or not num_bounds or not sizes[".bin"]:
        raise DataError(f"{prefix}.bin: holds no tokens; {REMEDY}")
    return IndexHeader(_integer_dtype(name, code), num_sequences, num_bounds)


def checked_num_tokens(
    prefix: str, header: IndexHeader, lengths: np.ndarray, pointers: np.ndarray
) -> int:
    """Tokens in the file, after checking that its sequences fill the .bin without gap or overlap.

    Args:
        prefix: of the token file.
        header: of its index.
        lengths: tokens of each sequence, int32 of shape (sequences,).
        pointers: first byte of each sequence, int64 of shape (sequences,).

    Raises:
        DataError: they do not.
    """
    itemsize = header.dtype.itemsize
    position = 0  # in bytes
    for start in range(0, header.num_sequences, _CHUNK):
        sizes = lengths[start : start + _CHUNK].astype(np.int64) * itemsize
        ends = position + np.cumsum(sizes)
        wrong = (pointers[start : start + _CHUNK] != ends - sizes) | (sizes < 0)
        if wrong.any():
            number = start + int(np.argmax(wrong))
            raise DataError(
                f"{prefix}.idx: sequence {number} does not follow the one before it directly; "
                f"{REMEDY}"
            )
        position = int(ends[-1])
    actual = _file_size(f"{prefix}.bin")
    if actual != position:
        raise DataError(
            f"{prefix}.bin: {actual} bytes, but the index describes {position}; the file was cut "
            f"short or belongs to another index; {REMEDY}"
        )
    return position // itemsize


def check_bounds(prefix: str, header: IndexHeader, bounds: np.ndarray) -> None:
    """Check that documents are runs of sequences, one after the other, from the first to the last.

    Args:
        prefix: of the token file.
        header: of its index.
        bounds: first sequence of each document and the end of the last, int64 of shape (bounds,).

    Raises:
        DataError: they are not.
    """
    sound = bounds[0] == 0 and bounds[-1] == header.num_sequences
    for start in range(0, header.num_bounds, _CHUNK):
        part = bounds[start : start + _CHUNK + 1]
        sound = sound and bool((part[1:] >= part[:-1]).all())
    if not sound:
        raise DataError(f"{prefix}.idx: damaged document bounds; {REMEDY}")


def _file_size(path: str) -> int:
    try:
        with open_regular(path) as stream:
            return os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; name the prefix of a token file written by "
            "tools/prepare_data.py"
        ) from error


def _integer_dtype(name: str, code: int) -> np.dtype:
    try:
        dtype = np.dtype(indexed_dataset_module().DType.dtype_from_code(code))
    except ValueError as error:
        raise DataError(f"{name}: unknown type code {code}; {REMEDY}") from error
    if dtype.kind not in "iu":
        raise DataError(f"{name}: tokens of type {dtype} are not integers; {REMEDY}")
    return dtype
