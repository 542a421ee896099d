"""Documents encoded batch by batch, and kept in files until they are joined."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from relora_ds.data.formats import PIECE_LENGTH, Piece
from relora_ds.data.tokenizer import AnyTokenizer

_BATCH_LENGTH = 8 * PIECE_LENGTH  # characters encoded at once; bounds the ids held in memory


class Encoded(NamedTuple):
    """Ids of some consecutive sequences, of which one or more make a document."""

    tokens: np.ndarray
    """All ids, one after the other, in the type that they are stored in."""
    lengths: list[int]
    """Ids of each sequence."""
    bounds: list[int]
    """Numbers of sequences after which a document ends, counted from the first one here."""


@dataclass(frozen=True)
class Part:
    """Encoded documents that lie in a file of their own."""

    path: Path
    """Holds the ids alone."""
    lengths: np.ndarray
    """Ids of each sequence, int32."""
    bounds: np.ndarray
    """Numbers of sequences after which a document ends, int64."""
    max_token_id: int
    """Largest id; 0 where there is none."""
    skipped: dict[str, int]
    """Inputs that were left out, by reason."""


class Builder(Protocol):
    """Megatron's `IndexedDatasetBuilder`, as far as it is used here."""

    data_file: BinaryIO
    sequence_lengths: list[int]
    document_indices: list[int]


def encode(
    pieces: Iterable[Piece], tokenizer: AnyTokenizer, dtype: np.dtype[np.generic]
) -> Iterator[Encoded]:
    """Ids of documents, each with the tokenizer's eos id at its end.

    They do not depend on how the pieces are put into batches.
    """
    for batch in _batches(pieces):
        sequences: list[np.ndarray] = []
        bounds: list[int] = []
        for piece, ids in zip(batch, _ids(tokenizer, batch), strict=True):
            whole = [*ids, tokenizer.eos_id] if piece.last else ids
            sequences.append(np.asarray(whole, dtype=dtype))
            if piece.last:
                bounds.append(len(sequences))
        yield Encoded(np.concatenate(sequences), [each.size for each in sequences], bounds)


def append(builder: Builder, encoded: Encoded) -> None:
    """Put encoded documents behind those that a builder has."""
    builder.data_file.write(encoded.tokens.tobytes())
    _append_index(builder, encoded.lengths, encoded.bounds)


def append_part(builder: Builder, part: Part) -> None:
    """Put the documents of a part behind those that a builder has."""
    with open(part.path, "rb") as stream:
        shutil.copyfileobj(stream, builder.data_file)
    _append_index(builder, part.lengths.tolist(), part.bounds.tolist())


def _append_index(builder: Builder, lengths: list[int], bounds: list[int]) -> None:
    before = len(builder.sequence_lengths)
    builder.sequence_lengths.extend(lengths)
    builder.document_indices.extend(before + bound for bound in bounds)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces of about `_BATCH_LENGTH` characters."""
    batch: list[Piece] = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece.text)
        if length >= _BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _ids(tokenizer: AnyTokenizer, batch: list[Piece]) -> Iterator[list[int]]:
    """Ids of each piece, in order."""
    begun = iter(tokenizer.encode_batch([piece.text for piece in batch if piece.first]))
    continued = iter(
        tokenizer.encode_batch([piece.text for piece in batch if not piece.first], continued=True)
    )
    for piece in batch:
        yield next(begun if piece.first else continued)
