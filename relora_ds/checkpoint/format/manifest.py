"""Which files a checkpoint consists of, and proof that they are the ones that were written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from relora_ds.checkpoint.format import layout
from relora_ds.errors import CheckpointError
from relora_ds.files.durable import Written

_BLOCK = 1 << 20


class _File(BaseModel):
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    files: dict[str, _File]


def write_manifest(directory: Path) -> None:
    """Record size and SHA-256 of every file below `directory`, and force all of them to disk."""
    manifest = directory / layout.MANIFEST
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p != manifest):
        _sync(path)
        files[str(path.relative_to(directory))] = {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n")
    _sync(manifest)


def encode_manifest(files: Mapping[str, Written]) -> bytes:
    """The manifest of a checkpoint that consists of these files, by name."""
    listed = {name: {"bytes": w.bytes, "sha256": w.sha256} for name, w in sorted(files.items())}
    return (json.dumps({"files": listed}, indent=1) + "\n").encode()


def is_complete(directory: Path) -> bool:
    """Whether a directory has a manifest and every file in it, in size; contents are not read."""
    try:
        listed = _Manifest.model_validate_json((directory / layout.MANIFEST).read_bytes()).files
        return bool(listed) and all(
            (directory / name).stat().st_size == file.bytes for name, file in listed.items()
        )
    except (OSError, ValueError):
        return False


def verify_manifest(directory: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the manifest or a file is missing, or a file is not what was written.
    """
    path = directory / layout.MANIFEST
    try:
        files = _Manifest.model_validate_json(path.read_bytes()).files
    except (OSError, ValueError) as error:
        reason = "it does not list files" if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); the checkpoint is incomplete: resume from another "
            "with checkpoint.resume=PATH"
        ) from error
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(
                f"{file}: missing; copy the whole checkpoint or resume from another one"
            )
        size = file.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(
                f"{file}: {size} bytes, but {expected.bytes} were written; the file is "
                "truncated: resume from another checkpoint with checkpoint.resume=PATH"
            )
        if _sha256(file) != expected.sha256:
            raise CheckpointError(
                f"{file}: the content changed since it was written (SHA-256 differs); resume from "
                "another checkpoint with checkpoint.resume=PATH"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
