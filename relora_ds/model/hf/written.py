"""What an export wrote, recorded beside it: a file that was edited since is somebody's work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from relora_ds.files.objects import read_object
from relora_ds.files.regular import open_regular

NAME = "relora_ds.json"


@dataclass(frozen=True)
class Written:
    """The files of an export that a person may edit, which are all but its weights."""

    hashes: Mapping[str, str]
    """SHA-256 of the contents, in hexadecimal, by path within the export."""

    @classmethod
    def found_in(cls, folder: Path) -> Written:
        """The files as they lie in a folder now.

        Raises:
            OSError: one cannot be read.
        """
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        named = {str(path.relative_to(folder)): path for path in paths}
        kept = {
            name: path
            for name, path in named.items()
            if path.suffix != ".safetensors" and name != NAME
        }
        return cls({name: _hash(path) for name, path in kept.items()})

    @classmethod
    def recorded_in(cls, export: Path) -> Written:
        """The files as they were written; none where that was not recorded."""
        hashes = (read_object(export / NAME) or {}).get("sha256")
        return cls(hashes if isinstance(hashes, dict) else {})

    def dump(self) -> bytes:
        """Contents of the file that records them."""
        return (json.dumps({"sha256": dict(self.hashes)}, indent=2) + "\n").encode()

    def edited_in(self, export: Path) -> list[str]:
        """Files that are there, but not as they were written, sorted."""
        return sorted(name for name in self.hashes if self._is_edited(export, name))

    def rewritten(self, name: str, before: bytes, after: bytes) -> Written:
        """The files after this program changed one, which stays edited if it was.

        Args:
            name: path within the export.
            before: what it held.
            after: what it holds now.
        """
        if self.hashes.get(name) != hashlib.sha256(before).hexdigest():
            return self
        return Written({**self.hashes, name: hashlib.sha256(after).hexdigest()})

    def _is_edited(self, export: Path, name: str) -> bool:
        try:
            return _hash(export / name) != self.hashes[name]
        except FileNotFoundError:
            return False
        except OSError:  # something else is there, or what nobody can read
            return True


def _hash(path: Path) -> str:
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
