"""From text to token files in Megatron's format."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from relora_ds.data.corpus import no_documents
from relora_ds.data.formats import OnError
from relora_ds.data.ingest.encode import Builder, Part, append, append_part, encode
from relora_ds.data.ingest.texts import Share, TextFiles, Texts
from relora_ds.data.ingest.workers import encode_shares
from relora_ds.data.token_files.contents import ends_fingerprint, read_contents
from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.data.token_files.metadata import TokenFileMetadata, token_file_prefix
from relora_ds.data.tokenizer import AnyTokenizer, open_tokenizer
from relora_ds.errors import DataError
from relora_ds.files.scratch import scratch_folder

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with what was read so far and with all that there is, if anybody knows: bytes of files,
rows of a data set."""


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    text_key: str = "text",
    on_error: OnError = "fail",
    progress: Progress | None = None,
    workers: int = 1,
) -> TokenFileMetadata:
    """Encode the documents of text files; see `prepare_texts`.

    Args:
        inputs: files in any format that `DocumentReader` reads.
        tokenizer_path: SentencePiece model, `tokenizer.json`, or a directory with one of them.
        output_prefix: path of the files to write, without suffix; existing ones are replaced.
        text_key: key or column of the text.
        on_error: what to do with input that cannot be used, see `DocumentReader`.
        progress: called after every batch of documents.
        workers: processes that share the files.

    Raises:
        DataError: the tokenizer or the input cannot be used, or the output cannot be written.
    """
    texts = TextFiles(inputs, text_key, on_error)
    return prepare_texts(texts, tokenizer_path, output_prefix, progress, workers)


def prepare_texts(
    texts: Texts,
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    progress: Progress | None = None,
    workers: int = 1,
) -> TokenFileMetadata:
    """Encode documents and write `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`.

    Every document ends with the tokenizer's eos id. Ids are stored as uint16 where the vocabulary
    allows it, otherwise as int32. A document that is read in pieces becomes one document of several
    sequences in Megatron's terms.

    The files are written under another name and renamed at the end, the index last: a run that is
    killed leaves nothing that can be opened. They are the same, byte by byte, for any number of
    workers.

    Args:
        texts: the documents.
        tokenizer_path: SentencePiece model, `tokenizer.json`, or a directory with one of them.
        output_prefix: path of the files to write, without suffix; existing ones are replaced.
        progress: called after every batch of documents.
        workers: processes that share the documents. With more than one, the ids take their place on
            the disk twice for a while; a program that asks for them guards its main module, as
            `multiprocessing` wants it.

    Returns:
        What was written to `PREFIX.json`.

    Raises:
        DataError: the tokenizer or the input cannot be used, or the output cannot be written.
    """
    tokenizer = open_tokenizer(tokenizer_path)
    prefix = Path(token_file_prefix(output_prefix))
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(prefix.parent, ".prepare-") as scratch:
            draft = scratch / prefix.name
            metadata = _write(draft, texts, tokenizer, progress, workers)
            _publish(draft, prefix)
    except OSError as error:
        raise DataError(f"{prefix}: cannot be written: {error.strerror or error}") from error
    if metadata.skipped:
        logger.warning("%s: left out %s", prefix, metadata.skipped)
    return metadata


def _write(
    draft: Path,
    texts: Texts,
    tokenizer: AnyTokenizer,
    progress: Progress | None,
    workers: int,
) -> TokenFileMetadata:
    # late: bad input and --help should not wait for it
    indexed = indexed_dataset_module()
    kind = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    dtype = np.dtype(kind)
    builder = indexed.IndexedDatasetBuilder(f"{draft}.bin", dtype=kind)
    shares = texts.shares(workers)
    encoding = _Encoding(builder, texts.total, progress)
    if workers == 1 or len(shares) == 1:
        encoding.take(shares, tokenizer, dtype)
    else:
        parts = encode_shares(
            shares, tokenizer.path, dtype, draft.parent, workers, encoding.advance
        )
        with contextlib.closing(parts):  # ends the workers before their folder goes
            for part in parts:
                encoding.take_part(part)
    skipped = dict(sorted(encoding.skipped.items()))
    sources = texts.sources()
    num_documents = len(builder.document_indices) - 1
    if not num_documents:
        raise no_documents([source.path for source in sources], skipped)
    builder.finalize(f"{draft}.idx")
    # read back, so that what is recorded is what lies there
    contents = read_contents(str(draft), dtype, len(os.sched_getaffinity(0)))
    metadata = TokenFileMetadata(
        num_tokens=sum(builder.sequence_lengths),
        num_documents=num_documents,
        max_token_id=max(tokenizer.eos_id, encoding.largest),
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        tokenizer_sha256=tokenizer.sha256,
        eos_id=tokenizer.eos_id,
        sources=sources,
        skipped=skipped,
        fingerprint=ends_fingerprint(str(draft)),
        contents=contents.hashes,
    ).sealed()
    metadata.save(f"{draft}.json")
    return metadata


class _Encoding:
    """A token file in the making.

    Args:
        builder: takes the ids.
        total: how much there is to read, if anybody knows.
        progress: told how much was.
    """

    def __init__(self, builder: Builder, total: int | None, progress: Progress | None) -> None:
        self.skipped: Counter[str] = Counter()
        """Inputs that were left out so far, by reason."""
        self.largest = 0
        """Largest id so far."""
        self._builder = builder
        self._total = total
        self._progress = progress
        self._position = 0

    def advance(self, count: int) -> None:
        """Report how much more was read."""
        self._position += count
        if self._progress is not None:
            self._progress(self._position, self._total)

    def take(
        self, shares: Sequence[Share], tokenizer: AnyTokenizer, dtype: np.dtype[np.generic]
    ) -> None:
        """Encode shares in this process."""
        for share in shares:
            reader, before = share.open(), self._position
            for batch in encode(reader.pieces(), tokenizer, dtype):
                append(self._builder, batch)
                self.largest = max(self.largest, int(batch.tokens.max(initial=0)))
                self.advance(before + reader.position - self._position)
            self.skipped.update(reader.skipped)

    def take_part(self, part: Part) -> None:
        """Take over what a worker has encoded, and remove its file."""
        append_part(self._builder, part)
        part.path.unlink()
        self.largest = max(self.largest, part.max_token_id)
        self.skipped.update(part.skipped)


def _publish(draft: Path, prefix: Path) -> None:
    """Move the three files into place; without its index a token file cannot be opened."""
    for suffix in (".bin", ".json", ".idx"):
        with open(f"{draft}{suffix}", "rb") as stream:
            os.fsync(stream.fileno())
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for suffix in (".bin", ".json", ".idx"):
        os.replace(f"{draft}{suffix}", f"{prefix}{suffix}")
