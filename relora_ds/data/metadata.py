"""What a token file says about itself: `PREFIX.json` beside `PREFIX.bin` and `PREFIX.idx`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_SAMPLE_BYTES = 1 << 20


class SourceFile(BaseModel):
    """One input of `prepare`."""

    model_config = ConfigDict(frozen=True, strict=True)

    path: str
    """The path as it was named on the command line."""
    bytes: int
    """Size of the file."""


class TokenFileMetadata(BaseModel):
    """Contents of `PREFIX.json`."""

    model_config = ConfigDict(frozen=True, strict=True)

    num_tokens: int
    """Tokens in the file, the eos of every document included."""
    num_documents: int
    """Documents in the file."""
    max_token_id: int
    """Largest id in the file."""
    vocab_size: int
    """Size of the tokenizer's vocabulary."""
    dtype: str
    """NumPy name of the type of one token."""
    tokenizer_sha256: str
    """Hash of the tokenizer's model file."""
    sources: tuple[SourceFile, ...]
    """Files that the tokens came from."""
    skipped: dict[str, int]
    """Inputs that were left out, by reason."""
    fingerprint: str
    """`fingerprint` of the two files that this description belongs to."""

    def save(self, path: str | Path) -> None:
        """Write as indented JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def token_file_prefix(path: str | Path) -> str:
    """The prefix itself, from a prefix or from the name of its `.bin` or `.idx` file."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def fingerprint(prefix: str) -> str:
    """Cheap identity of a token file: hash of the sizes, first and last MiB of both files.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with open(prefix + suffix, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
