"""An English corpus for trials without any download: the documentation that ships with Python.

Its blocks are the topics of `pydoc` and the docstrings of the standard library, read as text
without running anything. The corpus and its tokenizer are built on first use and kept.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from relora_ds.data.token_files.contents import read_contents
from relora_ds.data.token_files.metadata import read_metadata
from relora_ds.errors import DataError
from relora_ds.files.regular import read_regular
from relora_ds.files.scratch import remove_leftovers, scratch_folder

_logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the cache's name; raise it when the same Python would give another corpus."""
_VALID_EVERY = 20
_MIN_CHARACTERS = 200_000
_LOCK_SECONDS = 600
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_MODEL = "tokenizer.model"
_MODEL_BYTES = 64 << 20
_SCRATCH = ".builtin-"


@dataclass(frozen=True)
class BuiltinCorpus:
    """Where the parts of the builtin corpus lie."""

    train_prefix: Path
    """Token file of 19 in 20 blocks."""
    valid_prefix: Path
    """Token file of every 20th block."""
    tokenizer_path: Path
    """SentencePiece model, trained on the training part."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/relora_ds`, or `~/.cache/relora_ds`.

    Raises:
        DataError: there is neither, as for a user that has a number only.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise DataError(
            "this user has no home directory, in which the builtin corpus would be kept: name "
            "another one with data.cache_dir or XDG_CACHE_HOME, or set HOME"
        )
    return Path(base, "relora_ds")


def builtin_corpus(cache_dir: str | Path, vocab_size: int) -> BuiltinCorpus:
    """The builtin corpus, built unless it is in the cache. Safe for processes that start together.

    Args:
        cache_dir: folder of the cache; created if need be.
        vocab_size: vocabulary of the corpus' tokenizer.

    Raises:
        DataError: the cache cannot be written, another process holds it for ten minutes, this
            Python comes without its documentation, or the vocabulary is too large for the corpus.
    """
    name = f"builtin-py{platform.python_version()}-v{vocab_size}-f{FORMAT_VERSION}"
    folder = Path(cache_dir, name)
    remove_leftovers(folder.parent, _SCRATCH)
    problem = _problem(folder)
    if problem is not None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{folder}.lock", timeout=_LOCK_SECONDS):
                problem = _problem(folder)
                if problem is not None:
                    if folder.exists():
                        _logger.warning("building %s again: %s", folder, problem)
                    _build(folder, vocab_size)
        except filelock.Timeout as error:
            raise DataError(
                f"{folder}.lock: held for {_LOCK_SECONDS} s by another process; end it, or set "
                "data.cache_dir to another folder"
            ) from error
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be built: {error.strerror or error}; set data.cache_dir to a "
                "folder that can be written"
            ) from error
    return BuiltinCorpus(folder / "train", folder / "valid", folder / _MODEL)


def blocks(library: Path) -> Iterator[str]:
    """Pieces of prose in a standard library: topics first, then docstrings by file and line.

    A paragraph appears once: where it comes again it is left out, and so is a block of which
    nothing is left. The order depends on the files alone.

    Args:
        library: folder of the standard library.
    """
    seen: set[str] = set()
    for text in _texts(library):
        fresh: list[str] = []
        for paragraph in text.split("\n\n"):
            bare = paragraph.strip()
            if bare and bare not in seen:
                fresh.append(paragraph.strip("\n"))
                seen.add(bare)
        if fresh:
            yield "\n\n".join(fresh)


def _problem(folder: Path) -> str | None:
    """Why the cache cannot be used, or None. Every byte is read: a damaged cache is built again."""
    try:
        sha256 = hashlib.sha256(read_regular(folder / _MODEL, _MODEL_BYTES)).hexdigest()
        for part in ("train", "valid"):
            prefix = str(folder / part)
            metadata = read_metadata(prefix)
            if metadata is None or metadata.contents is None:
                return f"{prefix}.json is missing, or of an earlier version"
            if metadata.tokenizer_sha256 != sha256:
                return f"{folder / _MODEL} is not the tokenizer of {prefix}.bin"
            if read_contents(prefix, np.dtype(metadata.dtype)).hashes != metadata.contents:
                return f"{prefix}.bin or {prefix}.idx was altered"
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror or error}"
    return None


def _build(folder: Path, vocab_size: int) -> None:
    """Build beside `folder` and rename: a build that is killed leaves nothing under that name."""
    # imported here because a cached corpus needs neither Arrow nor SentencePiece
    from relora_ds.data.prepare import prepare
    from relora_ds.data.tokenizer import train_tokenizer

    with scratch_folder(folder.parent, _SCRATCH) as scratch:
        draft = scratch / folder.name
        draft.mkdir()
        _write_text(draft, list(blocks(Path(sysconfig.get_path("stdlib")))))
        train_tokenizer([draft / "train.jsonl"], vocab_size, draft / _MODEL)
        for part in ("train", "valid"):
            metadata = prepare([draft / f"{part}.jsonl"], draft / _MODEL, draft / part)
            sources = tuple(
                source.model_copy(update={"path": Path(source.path).name})
                for source in metadata.sources
            )  # the scratch folder's name is of no use later, and differs from build to build
            metadata = metadata.model_copy(update={"sources": sources}).sealed()
            metadata.save(draft / f"{part}.json")
        if folder.exists():  # damaged; it goes with the scratch folder
            os.replace(folder, scratch / "damaged")
        os.replace(draft, folder)


def _write_text(draft: Path, texts: list[str]) -> None:
    size = sum(map(len, texts))
    if size < _MIN_CHARACTERS:
        raise DataError(
            f"the standard library in {sysconfig.get_path('stdlib')} holds only {size} characters "
            "of documentation; use a complete Python, or set data.source to files"
        )
    parts = {
        "train": [text for number, text in enumerate(texts, 1) if number % _VALID_EVERY],
        "valid": texts[_VALID_EVERY - 1 :: _VALID_EVERY],
    }
    for part, chosen in parts.items():
        records = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        Path(draft, f"{part}.jsonl").write_text(records, encoding="utf-8")


def _texts(library: Path) -> Iterator[str]:
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        yield from _topics(topics)
    for path in _modules(library):
        if path != topics:
            yield from _docstrings(_parse(path))


def _modules(library: Path) -> Iterable[Path]:
    """Source files below `library`, sorted, tests and installed packages left out."""
    found = (path.relative_to(library) for path in library.rglob("*.py"))
    return [library / path for path in sorted(found) if not _SKIPPED_FOLDERS & {*path.parts}]


def _parse(path: Path) -> ast.Module:
    """The syntax tree; an empty one where the file is not valid Python, as with some templates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on invalid escapes in old modules
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _topics(path: Path) -> Iterator[str]:
    """Values of the dictionary `topics`, by key."""
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            yield from (_tidy(topics[key]) for key in sorted(topics))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield _tidy(text)


def _tidy(text: str) -> str:
    """Without a common indentation, trailing blanks and characters that are damage in a text."""
    lines = textwrap.dedent(text).replace("\r\n", "\n").replace("\0", "").split("\n")
    return "\n".join(line.rstrip() for line in lines)
