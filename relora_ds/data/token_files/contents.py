"""The identity of a token file's contents, and the range of its ids, from one reading of all of it.

Both files are hashed in blocks, and the hashes of the blocks are hashed again. So the work can be
shared out over threads and processes, and the result does not depend on how it was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from relora_ds.files.regular import open_regular

BLOCK_BYTES = 64 << 20
"""Bytes that are hashed as one; the fingerprint depends on it."""
SUFFIXES = (".bin", ".idx")
_PIECE_BYTES = 1 << 20  # read at once; a multiple of every token's size
_SAMPLE_BYTES = 1 << 20
_KIND = "sha256/64MiB:"


class Hashes(BaseModel):
    """Hash of the block hashes of either file, in hexadecimal."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    bin: str
    """Of `PREFIX.bin`."""
    idx: str
    """Of `PREFIX.idx`."""

    @property
    def fingerprint(self) -> str:
        """Identity of both files together; its first word names the way of hashing."""
        return _KIND + hashlib.sha256(f"{self.bin}{self.idx}".encode()).hexdigest()


class BlockReport(NamedTuple):
    """What was found in one block."""

    suffix: str
    """File that it is of."""
    size: int
    """Bytes."""
    digest: bytes
    """SHA-256."""
    smallest: int
    """Smallest token id in it, 0 at most; 0 for a block of the index."""
    largest: int
    """Largest token id in it, 0 at least; 0 for a block of the index."""


@dataclass(frozen=True)
class Contents:
    """What a token file holds, as it was read from the first to the last byte."""

    hashes: Hashes
    smallest: int
    """Smallest token id, 0 at most."""
    largest: int
    """Largest token id."""


def read_blocks(
    prefix: str, dtype: np.dtype, part: int = 0, parts: int = 1, threads: int = 1
) -> list[BlockReport]:
    """Read one part of a token file's blocks: every `parts`-th from number `part` on.

    Args:
        prefix: of the token file.
        dtype: type of one token.
        part: which part, from 0.
        parts: among how many readers the work is shared out.
        threads: blocks that are read at the same time; each takes a MiB of memory.

    Raises:
        OSError: a file cannot be read.
    """
    blocks = [
        (suffix, start)
        for suffix in SUFFIXES
        for start in range(0, _size(prefix + suffix), BLOCK_BYTES)
    ][part::parts]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(lambda block: _read_block(prefix, block[0], block[1], dtype), blocks))


def join_reports(parts: Sequence[Sequence[BlockReport]]) -> Contents:
    """The contents, from what the readers of all parts found.

    Args:
        parts: results of `read_blocks` for part 0, 1, ...
    """
    count = sum(map(len, parts))
    reports = [parts[number % len(parts)][number // len(parts)] for number in range(count)]
    roots = {suffix: hashlib.sha256() for suffix in SUFFIXES}
    for report in reports:
        roots[report.suffix].update(report.size.to_bytes(8, "little") + report.digest)
    return Contents(
        Hashes(bin=roots[".bin"].hexdigest(), idx=roots[".idx"].hexdigest()),
        smallest=min((report.smallest for report in reports), default=0),
        largest=max((report.largest for report in reports), default=0),
    )


def read_contents(prefix: str, dtype: np.dtype, threads: int = 1) -> Contents:
    """Read a whole token file. Needs no more memory for a larger one.

    Raises:
        OSError: a file cannot be read.
    """
    return join_reports([read_blocks(prefix, dtype, threads=threads)])


def ends_fingerprint(prefix: str) -> str:
    """Hash of the sizes, the first and the last MiB of both files, as checkpoints of earlier
    versions recorded it.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for suffix in SUFFIXES:
        with open_regular(prefix + suffix) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def covers_everything(fingerprint: str) -> bool:
    """Whether a recorded fingerprint is of the whole contents, and not of a file's ends."""
    return fingerprint.startswith(_KIND)


def _size(path: str) -> int:
    with open_regular(path) as stream:
        return os.fstat(stream.fileno()).st_size


def _read_block(prefix: str, suffix: str, start: int, dtype: np.dtype) -> BlockReport:
    digest, piece = hashlib.sha256(), bytearray(_PIECE_BYTES)
    size = smallest = largest = 0
    with open_regular(prefix + suffix) as stream:
        stream.seek(start)
        while size < BLOCK_BYTES and (count := stream.readinto(piece)):
            read = memoryview(piece)[:count]
            digest.update(read)
            size += count
            if suffix == ".bin":
                tokens = np.frombuffer(read[: count - count % dtype.itemsize], dtype)
                smallest = min(smallest, int(tokens.min(initial=0)))
                largest = max(largest, int(tokens.max(initial=0)))
    return BlockReport(suffix, size, digest.digest(), smallest, largest)
