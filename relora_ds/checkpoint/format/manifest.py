"""Which files a checkpoint consists of, with size and SHA-256 of each."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_ds.checkpoint.format import layout
from relora_ds.errors import CheckpointError
from relora_ds.files.durable import Written
from relora_ds.files.regular import open_regular, read_regular

_BLOCK = 1 << 20
_MAX_BYTES = 16 << 20  # a hundred bytes a file, of a few files per process
_ANOTHER = "resume from another checkpoint with checkpoint.resume=PATH"


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    files: dict[str, _File]


@dataclass(frozen=True)
class Listed:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def encode_manifest(files: Mapping[str, Written]) -> bytes:
    """The manifest of a checkpoint that consists of these files, by name."""
    listed = {name: {"bytes": w.bytes, "sha256": w.sha256} for name, w in sorted(files.items())}
    return (json.dumps({"files": listed}, indent=1) + "\n").encode()


def write_manifest(directory: Path) -> None:
    """Describe every file in `directory`, and force all of them to disk."""
    files = {}
    for path in sorted(p for p in directory.iterdir() if p.name != layout.MANIFEST):
        _sync(path)
        files[path.name] = Written(path.stat().st_size, sha256(path))
    manifest = directory / layout.MANIFEST
    manifest.write_bytes(encode_manifest(files))
    _sync(manifest)


def read_manifest(directory: Path) -> dict[str, Listed]:
    """The files that a checkpoint consists of, by name.

    Raises:
        CheckpointError: there is no manifest, or it does not list files of this directory.
    """
    path = directory / layout.MANIFEST
    try:
        files = _Manifest.model_validate_json(read_regular(path, _MAX_BYTES)).files
    except ValidationError as error:
        raise _incomplete(path, "it does not list files with their sizes and SHA-256") from error
    except OSError as error:
        raise _incomplete(path, error.strerror or str(error)) from error
    for name in files:
        if name in ("", ".", "..", layout.MANIFEST) or "/" in name or "\0" in name:
            raise _incomplete(path, f"{name!r} is no name of a file beside it")
    if not files:
        raise _incomplete(path, "it lists nothing")
    return {name: Listed(file.bytes, file.sha256) for name, file in files.items()}


def is_complete(directory: Path) -> bool:
    """Whether a directory has a manifest and every file in it, in size; contents are not read."""
    try:
        listed = read_manifest(directory)
        return all(_size(directory / name) == file.bytes for name, file in listed.items())
    except (OSError, CheckpointError):
        return False


def check_file(path: Path, expected: Listed) -> None:
    """Make sure that a file is the one that was written.

    Raises:
        CheckpointError: it is missing, no regular file, or its size or content differs.
    """
    try:
        size = _size(path)
        if size != expected.bytes:
            raise CheckpointError(
                f"{path}: {size} bytes, but {expected.bytes} were written; the file is "
                f"truncated: {_ANOTHER}"
            )
        found = sha256(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing; copy the whole checkpoint or resume from another one"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); {_ANOTHER}"
        ) from error
    if found != expected.sha256:
        raise CheckpointError(
            f"{path}: the content changed since it was written (SHA-256 differs); {_ANOTHER}"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _size(path: Path) -> int:
    """Bytes of a regular file that is no link: what a link leads to may be replaced unseen."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "it is no regular file", str(path))
    return status.st_size


def _incomplete(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({reason}); the checkpoint is incomplete: {_ANOTHER}"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
