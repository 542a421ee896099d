"""What a token file says about itself: `PREFIX.json` beside `PREFIX.bin` and `PREFIX.idx`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from relora_ds.data.token_files.contents import Hashes
from relora_ds.errors import DataError
from relora_ds.files.regular import read_regular

_MAX_BYTES = 16 << 20
_SHOWN = 60  # characters of a name in a message
_REMEDY = (
    "write the token file again with tools/prepare_data.py, or move this .json away if the token "
    "file was made elsewhere"
)


class SourceFile(BaseModel):
    """One input of `prepare`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    path: str
    """The path as it was named on the command line."""
    bytes: int
    """Size of the file."""


class TokenFileMetadata(BaseModel):
    """Contents of `PREFIX.json`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

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
    eos_id: int | None = None
    """Id that ends every document; None in files of earlier versions."""
    sources: tuple[SourceFile, ...]
    """Files that the tokens came from."""
    skipped: dict[str, int]
    """Inputs that were left out, by reason."""
    fingerprint: str
    """`ends_fingerprint` of the two files, all that earlier versions recorded of their contents."""
    contents: Hashes | None = None
    """Hashes of the whole files; None in files of earlier versions."""
    record_sha256: str | None = None
    """Hash of everything above, which no other file could confirm; None as for `contents`."""

    def sealed(self) -> Self:
        """A copy with the hash of what it says."""
        return self.model_copy(update={"record_sha256": self._digest()})

    @property
    def is_sound(self) -> bool:
        """Whether it says what was written, as far as its version can tell."""
        if self.contents is None:
            return self.record_sha256 is None
        return self.record_sha256 == self._digest()

    def save(self, path: str | Path) -> None:
        """Write as indented JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def _digest(self) -> str:
        values = self.model_dump(mode="json", exclude={"record_sha256"})
        if self.eos_id is None:  # as earlier versions hashed it
            del values["eos_id"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_metadata(prefix: str) -> TokenFileMetadata | None:
    """What `prepare` wrote about a token file, or None where there is no `PREFIX.json`.

    Raises:
        DataError: there is one, but it is damaged or of something else.
    """
    path = f"{prefix}.json"
    try:
        metadata = TokenFileMetadata.model_validate_json(read_regular(path, _MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:_SHOWN]
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise DataError(
            f"{path}: is not what tools/prepare_data.py writes beside a token file ({reason}): "
            f"damaged, or of something else; {_REMEDY}"
        ) from error
    if not metadata.is_sound:
        raise DataError(f"{path}: was altered after it was written; {_REMEDY}")
    return metadata


def token_file_prefix(path: str | Path) -> str:
    """The prefix itself, from a prefix or from the name of its `.bin` or `.idx` file.

    A slash at its end, as shells complete it where a directory has that name, means nothing.
    """
    text = os.fspath(path).rstrip("/")
    return text[:-4] if text.endswith((".bin", ".idx")) else text
