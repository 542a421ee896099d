"""A token file, read as one flat stream of tokens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from relora_ds.data.token_files.contents import (
    BlockReport,
    Contents,
    ends_fingerprint,
    join_reports,
    read_blocks,
)
from relora_ds.data.token_files.index import (
    REMEDY,
    check_bounds,
    checked_num_tokens,
    read_header,
)
from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.data.token_files.metadata import (
    TokenFileMetadata,
    read_metadata,
    token_file_prefix,
)
from relora_ds.data.token_files.samples import TokenStream
from relora_ds.errors import DataError

_CHUNK = 1 << 22  # tokens scanned at once
_MAX_THREADS = 8


class TokenFile(TokenStream):
    """Tokens of `PREFIX.bin` and `PREFIX.idx`, memory-mapped; documents follow each other directly.

    Opening it checks the index and what `PREFIX.json` says of it. The contents are read once, from
    the first byte to the last, when they are first asked about; several processes can share that
    out (`examine`, `accept`).

    Args:
        path: the prefix, or the name of its `.bin` or `.idx` file.

    Raises:
        DataError: a file is missing, damaged or empty, or they do not belong together.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = token_file_prefix(path)
        """Path of the files without suffix."""
        header = read_header(self.prefix)
        self._dtype = header.dtype
        try:
            self._indexed = indexed_dataset_module().IndexedDataset(self.prefix)
        except AssertionError as error:  # Megatron's check of the document bounds
            raise DataError(f"{self.prefix}.idx: damaged document bounds; {REMEDY}") from error
        index = self._indexed.index
        check_bounds(self.prefix, header, index.document_indices)
        self.num_documents = header.num_bounds - 1
        """Documents in the file."""
        self.num_tokens = checked_num_tokens(
            self.prefix, header, index.sequence_lengths, index.sequence_pointers
        )
        """Tokens in the file."""
        self.metadata = self._fitting_metadata()
        """What `prepare` recorded, or None for a token file that was made elsewhere."""
        self._contents: Contents | None = None

    @property
    def tokenizer_sha256(self) -> str | None:
        """Hash of the tokenizer that produced the tokens, where it is recorded."""
        return self.metadata.tokenizer_sha256 if self.metadata else None

    @property
    def contents(self) -> Contents:
        """What the whole file holds; read now, and checked, unless it was before.

        Raises:
            DataError: see `examine` and `accept`.
        """
        if self._contents is None:
            self.accept(join_reports([self.examine()]))
        assert self._contents is not None
        return self._contents

    @property
    def fingerprint(self) -> str:
        """Identity of the contents, for a check at resume."""
        return self.contents.hashes.fingerprint

    @property
    def max_token_id(self) -> int:
        """Largest id in the file."""
        return self.contents.largest

    def ends_fingerprint(self) -> str:
        """Identity by which checkpoints of earlier versions know the file."""
        try:
            return ends_fingerprint(self.prefix)
        except OSError as error:
            raise self._unreadable(error) from error

    def examine(self, part: int = 0, parts: int = 1) -> list[BlockReport]:
        """Read one of `parts` equal parts of both files, on several threads.

        Raises:
            DataError: a file cannot be read.
        """
        threads = len(os.sched_getaffinity(0)) // parts
        try:
            return read_blocks(self.prefix, self._dtype, part, parts, min(threads, _MAX_THREADS))
        except OSError as error:
            raise self._unreadable(error) from error

    def accept(self, contents: Contents) -> None:
        """Check what was found in the file, and believe it from now on.

        Raises:
            DataError: it is not what was recorded, or there is a negative id.
        """
        if contents.smallest < 0:
            at = self.first_outside(0, contents.largest + 1)
            raise DataError(f"{self.prefix}.bin: token {at} has a negative id; {REMEDY}")
        if self.metadata is not None:
            self._check_record(self.metadata, contents)
        self._contents = contents

    def trust_record(self) -> bool:
        """Believe what `PREFIX.json` says of the contents after a look at both ends of the files.

        Returns:
            Whether there is such a record; without one the contents have to be read.

        Raises:
            DataError: the ends, or the sizes, are not those that were recorded.
        """
        if self.metadata is None or self.metadata.contents is None:
            return False
        self._check_ends(self.metadata)
        self._contents = Contents(self.metadata.contents, 0, self.metadata.max_token_id)
        return True

    def document_start(self, number: int) -> int:
        """First token of a document; for `num_documents`, the end of the last."""
        index = self._indexed.index
        sequence = int(index.document_indices[number])
        if sequence == len(index.sequence_pointers):
            return self.num_tokens
        return int(index.sequence_pointers[sequence]) // self._dtype.itemsize

    def first_outside(self, lower: int, upper: int) -> int | None:
        """Position of the first id that is not in [lower, upper), or None; reads up to there."""
        for start in range(0, self.num_tokens, _CHUNK):
            chunk = self._view(start, min(_CHUNK, self.num_tokens - start))
            outside = (chunk < lower) | (chunk >= upper)
            if outside.any():
                return start + int(np.argmax(outside))
        return None

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

    def _fitting_metadata(self) -> TokenFileMetadata | None:
        metadata = read_metadata(self.prefix)
        if metadata is None:
            return None
        found = {
            "tokens": (metadata.num_tokens, self.num_tokens),
            "documents": (metadata.num_documents, self.num_documents),
            "type of a token": (metadata.dtype, self._dtype.name),
        }
        for what, (recorded, actual) in found.items():
            if recorded != actual:
                raise self._misfit(".idx", f"{what}: {recorded} recorded, {actual} found")
        return metadata

    def _check_record(self, recorded: TokenFileMetadata, found: Contents) -> None:
        if recorded.contents is None:
            self._check_ends(recorded)
        else:
            for suffix, before, now in (
                (".bin", recorded.contents.bin, found.hashes.bin),
                (".idx", recorded.contents.idx, found.hashes.idx),
            ):
                if before != now:
                    raise self._misfit(suffix, "its SHA-256 differs")
        if recorded.max_token_id != found.largest:
            ids = f"largest id: {recorded.max_token_id} recorded, {found.largest} found"
            raise self._misfit(".bin", ids)

    def _check_ends(self, recorded: TokenFileMetadata) -> None:
        if recorded.fingerprint != self.ends_fingerprint():
            raise self._misfit(".bin", "size, beginning or end differ")

    def _misfit(self, suffix: str, difference: str) -> DataError:
        return DataError(
            f"{self.prefix}{suffix}: is not the file that {self.prefix}.json was written for "
            f"({difference}): one of them was altered, or is of another token file; copy all three "
            "files again, or write them again with tools/prepare_data.py"
        )

    def _unreadable(self, error: OSError) -> DataError:
        reason = error.strerror or error
        return DataError(f"{error.filename or self.prefix}: cannot be read: {reason}; {REMEDY}")
