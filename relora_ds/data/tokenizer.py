"""The tokenizer: opened whatever its kind, and SentencePiece models read and trained.

Models that are trained here are laid out as LLaMA's are: byte-pair encoding with a byte fallback,
so that any text survives the round trip, digits split, white space kept, and the ids unk 0, bos 1,
eos 2, pad 3.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from relora_ds.data.corpus import DocumentReader
from relora_ds.data.formats import OnError
from relora_ds.data.json_tokenizer import (
    COMPANIONS,
    JsonTokenizer,
    read_json_tokenizer,
    special_tokens,
)
from relora_ds.data.json_tokenizer import NAME as JSON_NAME
from relora_ds.errors import DataError
from relora_ds.files.regular import read_regular
from relora_ds.files.scratch import scratch_folder

SENTENCE_LENGTH = 4096
"""Characters after which a line is cut for training."""
MODEL_BYTES = 64 << 20
"""Largest model file; that of a vocabulary of 256,000 takes 4 MiB."""
TRAINING_BYTES = 128 << 20
"""Text that a tokenizer is trained on at most; of a larger corpus every n-th line is taken."""


NAME = "tokenizer.model"


class Tokenizer:
    """Text to ids and back by a SentencePiece model.

    Args:
        path: the model file.
        threads: that share the texts of a batch; -1 for one per core.

    Raises:
        DataError: the file is missing, is no SentencePiece model, or has no end-of-sequence id.
    """

    def __init__(self, path: str | Path, threads: int = -1) -> None:
        model = _read_model(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._continuing = _without_prefix(model)
        except (RuntimeError, DecodeError) as error:
            raise DataError(
                f"{path}: not a SentencePiece model, or damaged; train one with "
                "tools/train_tokenizer.py, or name the tokenizer.json that comes with a model"
            ) from error
        self.path = Path(path)
        self._threads = threads
        self.sha256 = hashlib.sha256(model).hexdigest()
        """Hash of the model file; token files record it."""
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        """-1 where the model defines none, as in LLaMA's own."""
        if self.eos_id < 0:
            raise DataError(f"{path}: the model has no eos id, which must end every document")

    def pieces(self) -> list[str | None]:
        """Every token by its id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos or eos."""
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        """Ids of each text; the texts are spread over threads.

        Args:
            texts: any number of texts.
            continued: the texts are later parts of longer ones, so the space with which a model of
                LLaMA's kind begins a text is not put before them.
        """
        processor = self._continuing if continued else self._processor
        return processor.encode(list(texts), out_type=int, num_threads=self._threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that form no character become U+FFFD."""
        return self._processor.decode([int(token) for token in ids])


AnyTokenizer = Tokenizer | JsonTokenizer
"""Both have the same members."""


def tokenizer_file(path: str | Path) -> Path:
    """The file that a tokenizer's name stands for: itself, or the one in a model's directory.

    A `tokenizer.json` goes before a `tokenizer.model` beside it, as in transformers.

    Raises:
        DataError: a directory holds neither.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for file in tokenizers_in(path):
        return file
    raise DataError(
        f"{path}: holds neither {JSON_NAME} nor {NAME}; name a SentencePiece model, a "
        "tokenizer.json of Hugging Face's, or a directory with one of them"
    )


def tokenizers_in(directory: Path) -> list[Path]:
    """Files of the tokenizers in a directory, the one that transformers takes first."""
    return [directory / name for name in (JSON_NAME, NAME) if (directory / name).is_file()]


def tokenizer_files(file: Path) -> dict[str, Path]:
    """The files that say everything of a tokenizer, by the name that they have in a directory.

    Args:
        file: what `tokenizer_file` returned.
    """
    if file.suffix.lower() != ".json":
        return {NAME: file}
    beside = {name: file.with_name(name) for name in COMPANIONS}
    return {JSON_NAME: file} | {name: path for name, path in beside.items() if path.is_file()}


class SpecialIds(NamedTuple):
    """Ids with a meaning; None for those that a tokenizer does not have."""

    bos: int | None
    eos: int | None
    pad: int | None


def special_ids(file: Path) -> SpecialIds:
    """Ids with a meaning of the tokenizer in a file.

    Raises:
        DataError: it cannot be read.
    """
    if file.suffix.lower() == ".json":
        found = {kind: number for kind, (_, number) in special_tokens(file).items()}
        return SpecialIds(found.get("bos"), found.get("eos"), found.get("pad"))
    model = Tokenizer(file)
    ids = (i if i >= 0 else None for i in (model.bos_id, model.eos_id, model.pad_id))
    return SpecialIds(*ids)


def open_tokenizer(path: str | Path, threads: int = -1) -> AnyTokenizer:
    """The tokenizer in a file or a model's directory: SentencePiece's, or a `tokenizer.json`.

    Args:
        path: the file or the directory.
        threads: that share the texts of a batch, -1 for one per core; the package tokenizers goes
            by `RAYON_NUM_THREADS`.

    Raises:
        DataError: it cannot be read or used.
    """
    file = tokenizer_file(path)
    return JsonTokenizer(file) if file.suffix.lower() == ".json" else Tokenizer(file, threads)


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 of a tokenizer's file in hexadecimal, without loading it.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    file = tokenizer_file(path)
    is_json = file.suffix.lower() == ".json"
    content = read_json_tokenizer(file) if is_json else _read_model(file)
    return hashlib.sha256(content).hexdigest()


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    text_key: str = "text",
    on_error: OnError = "fail",
) -> Tokenizer:
    """Train a tokenizer and write its model. The same input gives the same file.

    Args:
        inputs: files in any format that `DocumentReader` reads.
        vocab_size: number of ids, special and byte ids (260) included.
        output: model file to write; it appears complete or not at all.
        text_key: key or column of the text.
        on_error: what to do with input that cannot be used, see `DocumentReader`.

    Raises:
        DataError: the input cannot be used, the corpus is too small for the vocabulary or has too
            many characters for it, or the model cannot be written.
    """
    sentences = _thinned(_lines(DocumentReader(inputs, text_key, on_error)), TRAINING_BYTES)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation becomes one token per run
            max_sentence_length=4 * SENTENCE_LENGTH,  # in bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_problem(str(error), vocab_size)) from error
    _write_model(Path(output), model.getvalue())
    return Tokenizer(output)


def _without_prefix(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer, set not to put a space before a text."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _read_model(path: str | Path) -> bytes:
    try:
        model = read_regular(path, MODEL_BYTES)
    except OSError as error:
        raise DataError(f"{path}: tokenizer model cannot be read: {error.strerror}") from error
    if not model:  # SentencePiece accepts it and fails later
        raise DataError(f"{path}: the tokenizer model is empty; train it again")
    return model


def _write_model(output: Path, model: bytes) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(output.parent, ".tokenizer-") as scratch:
            draft = scratch / output.name
            draft.write_bytes(model)
            os.replace(draft, output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from error


def _lines(reader: DocumentReader) -> Iterator[str]:
    """Lines of the documents, cut to `SENTENCE_LENGTH`; a line end is left to the byte fallback."""
    for piece in reader:
        for line in piece.text.split("\n"):
            for start in range(0, len(line), SENTENCE_LENGTH):
                yield line[start : start + SENTENCE_LENGTH]


def _thinned(sentences: Iterable[str], budget: int) -> list[str]:
    """Every n-th sentence, with the smallest power of two for which they fit into `budget` bytes.

    The choice is spread evenly over the corpus and needs neither its length nor a random draw.
    """
    kept: list[str] = []
    stride, size = 1, 0
    for number, sentence in enumerate(sentences):
        if number % stride:
            continue
        kept.append(sentence)
        size += len(sentence.encode())
        while size > budget and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(len(text.encode()) for text in kept)
    return kept


def _training_problem(message: str, vocab_size: int) -> str:
    """Our words for the trainer's two complaints about vocabulary and corpus."""
    if largest := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"vocabulary of {vocab_size} is too large for this corpus: the largest possible value "
            f"is {largest[1]}; lower it or add text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocabulary of {vocab_size} is too small: special ids, bytes and the corpus' "
            f"characters alone take {smallest[1]}; raise it"
        )
    return f"SentencePiece cannot train on this corpus: {message}"
