"""From text to token files in Megatron's format."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from relora_ds.data.corpus import DocumentReader
from relora_ds.data.formats import PIECE_LENGTH, OnError, Piece
from relora_ds.data.token_files.contents import ends_fingerprint, read_contents
from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.data.token_files.metadata import (
    SourceFile,
    TokenFileMetadata,
    token_file_prefix,
)
from relora_ds.data.tokenizer import AnyTokenizer, open_tokenizer
from relora_ds.errors import DataError
from relora_ds.files.scratch import scratch_folder

logger = logging.getLogger(__name__)

_BATCH_LENGTH = 8 * PIECE_LENGTH  # characters encoded at once; bounds the ids held in memory

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and their total."""


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    text_key: str = "text",
    on_error: OnError = "fail",
    progress: Progress | None = None,
) -> TokenFileMetadata:
    """Encode documents and write `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`.

    Every document ends with the tokenizer's eos id. Ids are stored as uint16 where the vocabulary
    allows it, otherwise as int32. A document that is read in pieces becomes one document of several
    sequences in Megatron's terms.

    The files are written under another name and renamed at the end, the index last: a run that is
    killed leaves nothing that can be opened.

    Args:
        inputs: files in any format that `DocumentReader` reads.
        tokenizer_path: SentencePiece model, `tokenizer.json`, or a directory with one of them.
        output_prefix: path of the files to write, without suffix; existing ones are replaced.
        text_key: key or column of the text.
        on_error: what to do with input that cannot be used, see `DocumentReader`.
        progress: called after every batch of documents.

    Returns:
        What was written to `PREFIX.json`.

    Raises:
        DataError: the tokenizer or the input cannot be used, or the output cannot be written.
    """
    reader = DocumentReader(inputs, text_key, on_error)
    tokenizer = open_tokenizer(tokenizer_path)
    prefix = Path(token_file_prefix(output_prefix))
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(prefix.parent, ".prepare-") as scratch:
            draft = scratch / prefix.name
            metadata = _write(draft, reader, tokenizer, progress)
            _publish(draft, prefix)
    except OSError as error:
        raise DataError(f"{prefix}: cannot be written: {error.strerror or error}") from error
    if metadata.skipped:
        logger.warning("%s: left out %s", prefix, metadata.skipped)
    return metadata


def _write(
    draft: Path, reader: DocumentReader, tokenizer: AnyTokenizer, progress: Progress | None
) -> TokenFileMetadata:
    import torch  # late, as Megatron: bad input and --help should not wait for it

    indexed = indexed_dataset_module()
    dtype = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    builder = indexed.IndexedDatasetBuilder(f"{draft}.bin", dtype=dtype)
    num_tokens, max_token_id = 0, tokenizer.eos_id
    total = sum(reader.sizes)
    for batch in _batches(reader):
        for piece, ids in zip(batch, _encoded(tokenizer, batch), strict=True):
            tokens = np.asarray([*ids, tokenizer.eos_id] if piece.last else ids, dtype=dtype)
            builder.add_item(torch.from_numpy(tokens))
            if piece.last:
                builder.end_document()
            num_tokens += tokens.size
            max_token_id = max(max_token_id, int(tokens.max(initial=0)))
        if progress is not None:
            progress(reader.bytes_read, total)
    builder.finalize(f"{draft}.idx")
    # read back, so that what is recorded is what lies there
    contents = read_contents(str(draft), np.dtype(dtype), len(os.sched_getaffinity(0)))
    metadata = TokenFileMetadata(
        num_tokens=num_tokens,
        num_documents=reader.documents,
        max_token_id=max_token_id,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.__name__,
        tokenizer_sha256=tokenizer.sha256,
        eos_id=tokenizer.eos_id,
        sources=tuple(
            SourceFile(path=str(path), bytes=size)
            for path, size in zip(reader.paths, reader.sizes, strict=True)
        ),
        skipped=reader.skipped,
        fingerprint=ends_fingerprint(str(draft)),
        contents=contents.hashes,
    ).sealed()
    metadata.save(f"{draft}.json")
    return metadata


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


def _encoded(tokenizer: AnyTokenizer, batch: list[Piece]) -> Iterator[list[int]]:
    """Ids of each piece, in order."""
    begun = iter(tokenizer.encode_batch([piece.text for piece in batch if piece.first]))
    continued = iter(
        tokenizer.encode_batch([piece.text for piece in batch if not piece.first], continued=True)
    )
    for piece in batch:
        yield next(begun if piece.first else continued)


def _publish(draft: Path, prefix: Path) -> None:
    """Move the three files into place; without its index a token file cannot be opened."""
    for suffix in (".bin", ".json", ".idx"):
        with open(f"{draft}{suffix}", "rb") as stream:
            os.fsync(stream.fileno())
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for suffix in (".bin", ".json", ".idx"):
        os.replace(f"{draft}{suffix}", f"{prefix}{suffix}")
