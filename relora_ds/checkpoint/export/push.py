"""Uploading an export to the Hugging Face Hub; only the `huggingface_hub` package knows the token.

Nothing is sent unless it is asked for twice: without `confirmed` a push says what it would send.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.extras import require
from relora_ds.redaction import mask_values, secret_values


@dataclass(frozen=True)
class Upload:
    """Files that a push sends."""

    repo: str
    """OWNER/NAME on the Hub."""
    files: dict[str, int]
    """Bytes by path within the export."""
    private: bool

    def __str__(self) -> str:
        total = sum(self.files.values())
        kind = "private" if self.private else "public"
        lines = [f"{len(self.files)} files, {total:,} bytes, to the {kind} model {self.repo}:"]
        return "\n".join([*lines, *(f"  {name}  {size:,}" for name, size in self.files.items())])


def check_repo(repo: str) -> None:
    """Make sure that a repository of the Hub may have this name.

    Raises:
        ConfigError: it is no OWNER/NAME.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) is None:
        raise ConfigError(f"--push {repo!r}: write OWNER/NAME, as of a model on huggingface.co")


def plan_upload(directory: Path, repo: str, private: bool) -> Upload:
    """What a push of an export would send."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {str(path.relative_to(directory)): path.stat().st_size for path in paths}
    return Upload(repo, files, private)


def push(directory: Path, upload: Upload) -> str:
    """Send an export; returns its address.

    The token is the one that `huggingface_hub` finds: `HF_TOKEN`, or that of `hf auth login`.

    Raises:
        ConfigError: `huggingface_hub` is not installed.
        CheckpointError: the Hub refused, or cannot be reached; credentials in its words are masked.
    """
    hub = require("huggingface_hub", "huggingface-hub", "--push")
    secrets = secret_values(os.environ)
    stored = hub.get_token()
    try:
        api = hub.HfApi()
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        files = [*upload.files]
        api.upload_folder(repo_id=upload.repo, folder_path=directory, allow_patterns=files)
    except (OSError, ValueError, RuntimeError) as error:
        known = [*secrets, stored] if stored else secrets
        reason = mask_values(" ".join(str(error).split()), known)
        raise CheckpointError(
            f"the push to {upload.repo} failed ({type(error).__name__}: {reason}); the export is "
            f"complete in {directory}: log in with `hf auth login`, and push again"
        ) from None
    return f"https://huggingface.co/{upload.repo}"
