"""A token file, read as one flat stream of tokens."""

from __future__ import annotations

import functools
import logging
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydantic

from relora_ds.data.indexed import indexed_dataset_module
from relora_ds.data.metadata import TokenFileMetadata, fingerprint, token_file_prefix
from relora_ds.errors import DataError

logger = logging.getLogger(__name__)

_REMEDY = "write it again with tools/prepare_data.py"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document bounds
_MAGIC = b"MMIDIDX\x00\x00"
_CHUNK = 1 << 22  # tokens or sequences scanned at once


class _Header(NamedTuple):
    """The fixed part of an index."""

    dtype: np.dtype
    num_sequences: int
    num_bounds: int


class TokenFile:
    """Tokens of `PREFIX.bin` and `PREFIX.idx`, memory-mapped; documents follow each other directly.

    Args:
        path: the prefix, or the name of its `.bin` or `.idx` file.

    Raises:
        DataError: a file is missing, damaged or empty, or the two do not belong together.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = token_file_prefix(path)
        """Path of the files without suffix."""
        header = _read_header(self.prefix)
        self._dtype = header.dtype
        try:
            self._indexed = indexed_dataset_module().IndexedDataset(self.prefix)
        except AssertionError as error:  # Megatron's check of the document bounds
            raise DataError(f"{self.prefix}.idx: damaged document bounds; {_REMEDY}") from error
        self.num_documents = header.num_bounds - 1
        """Documents in the file."""
        index = self._indexed.index
        self.num_tokens = _checked_num_tokens(
            self.prefix, header, index.sequence_lengths, index.sequence_pointers
        )
        """Tokens in the file."""
        self.fingerprint = fingerprint(self.prefix)
        """Cheap identity of the contents, for a check at resume."""
        self.metadata = self._read_metadata()
        """What `prepare` recorded, or None where there is no record that fits these files."""

    @property
    def tokenizer_sha256(self) -> str | None:
        """Hash of the tokenizer that produced the tokens, where it is recorded."""
        return self.metadata.tokenizer_sha256 if self.metadata else None

    @functools.cached_property
    def max_token_id(self) -> int:
        """Largest id: as recorded, otherwise found by reading the whole file once.

        Raises:
            DataError: the file holds a negative id.
        """
        if self.metadata:
            return self.metadata.max_token_id
        largest = 0
        for start in range(0, self.num_tokens, _CHUNK):
            chunk = self._view(start, min(_CHUNK, self.num_tokens - start))
            if chunk.min() < 0:
                at = start + int(np.argmax(chunk < 0))
                raise DataError(f"{self.prefix}.bin: token {at} has a negative id; {_REMEDY}")
            largest = max(largest, int(chunk.max()))
        return largest

    def window(self, start: int, count: int) -> np.ndarray:
        """A copy of tokens `[start, start + count)`, int64 of shape (count,).

        Raises:
            IndexError: the window is not inside of the file.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"[{start}, {start + count}) outside of {self.num_tokens} tokens")
        return self._view(start, count).astype(np.int64)

    def _view(self, start: int, count: int) -> np.ndarray:
        """The mapped tokens themselves. Never hand one out: the map is closed with its reader."""
        return self._indexed.bin_reader.read(
            dtype=self._dtype, count=count, offset=start * self._dtype.itemsize
        )

    def _read_metadata(self) -> TokenFileMetadata | None:
        path = Path(f"{self.prefix}.json")
        try:
            metadata = TokenFileMetadata.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, pydantic.ValidationError) as error:
            logger.warning("%s: not used, it is damaged or foreign: %s", path, error)
            return None
        if metadata.fingerprint != self.fingerprint:
            logger.warning("%s: not used, it describes other token files", path)
            return None
        return metadata


def _read_header(prefix: str) -> _Header:
    """The index's header, after checking the sizes that Megatron's reader takes on trust."""
    sizes = {suffix: _file_size(prefix + suffix) for suffix in (".bin", ".idx")}
    name = f"{prefix}.idx"
    with open(name, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(f"{name}: {len(head)} bytes are no index of a token file; {_REMEDY}")
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1:
        raise DataError(f"{name}: not an index of a Megatron token file, version 1; {_REMEDY}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if sizes[".idx"] != expected:
        raise DataError(
            f"{name}: {sizes['.idx']} bytes, but {num_sequences} sequences take {expected}; "
            f"{_REMEDY}"
        )
    if not num_sequences or not num_bounds or not sizes[".bin"]:
        raise DataError(f"{prefix}.bin: holds no tokens; {_REMEDY}")
    return _Header(_integer_dtype(name, code), num_sequences, num_bounds)


def _file_size(path: str) -> int:
    try:
        with open(path, "rb") as stream:
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
        raise DataError(f"{name}: unknown type code {code}; {_REMEDY}") from error
    if dtype.kind not in "iu":
        raise DataError(f"{name}: tokens of type {dtype} are not integers; {_REMEDY}")
    return dtype


def _checked_num_tokens(
    prefix: str, header: _Header, lengths: np.ndarray, pointers: np.ndarray
) -> int:
    """Tokens in the file, after checking that its sequences fill the .bin without gap or overlap.

    Args:
        prefix: of the token file.
        header: of its index.
        lengths: tokens of each sequence, int32 of shape (sequences,).
        pointers: first byte of each sequence, int64 of shape (sequences,).
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
                f"{_REMEDY}"
            )
        position = int(ends[-1])
    actual = _file_size(f"{prefix}.bin")
    if actual != position:
        raise DataError(
            f"{prefix}.bin: {actual} bytes, but the index describes {position}; the file was cut "
            f"short or belongs to another index; {_REMEDY}"
        )
    return position // itemsize
