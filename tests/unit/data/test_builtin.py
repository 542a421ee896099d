"""The builtin corpus: deterministic, without repeats, built once and never half."""

from __future__ import annotations

import json
import pwd
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ds.data import builtin
from relora_ds.data.builtin import BuiltinCorpus, blocks, builtin_corpus, default_cache_dir
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small share of the standard library, taken for the whole of it."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    small = tmp_path / "library"
    for name in (
        "pydoc_data/topics.py",
        "argparse.py",
        "email/message.py",
        "test/support.py",
    ):
        target = small / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = stdlib / name
        target.write_bytes(source.read_bytes() if source.exists() else b'"""Test."""')
    (small / "broken.py").write_text('"""Docs."""\ndef broken(:\n')
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(small))
    return small


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a cache, built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(library: Path, cache: Path) -> Path:
    """A cache with a whole corpus of the small library."""
    builtin_corpus(cache, 600)
    return cache


def contents(corpus: BuiltinCorpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.train_prefix.parent.iterdir()}


def test_blocks_are_prose_without_repeats(library: Path) -> None:
    found = list(blocks(library))
    assert found == list(blocks(library))
    assert found[0].startswith('The "assert" statement')
    assert any("Command-line parsing library" in text for text in found)
    paragraphs = [part.strip() for text in found for part in text.split("\n\n")]
    assert len({*paragraphs}) == len(paragraphs)
    (library / "test" / "more.py").write_text('"""Never read."""')
    (library / "aa.py").write_text('"""New text.\n\nNew text."""\ndef f():\n    """New text."""\n')
    assert [text for text in blocks(library) if "New text" in text] == ["New text."]
    assert not any("Never read" in text for text in blocks(library))


def test_build_is_deterministic_cached_and_repaired(library: Path, tmp_path: Path) -> None:
    corpus = builtin_corpus(tmp_path / "one", 600)
    assert corpus.train_prefix.parent.name.endswith("-v600-f1")
    first = contents(corpus)
    other = builtin_corpus(tmp_path / "two", 600)
    assert contents(other) == first
    other.tokenizer_path.unlink()
    assert contents(builtin_corpus(tmp_path / "two", 600)) == first
    for path in library.glob("*.py"):
        path.unlink()  # whatever is read from now on would differ
    assert builtin_corpus(tmp_path / "one", 600) == corpus
    assert contents(corpus) == first
    train, valid = TokenFile(corpus.train_prefix), TokenFile(corpus.valid_prefix)
    assert train.num_documents in range(19 * valid.num_documents, 19 * valid.num_documents + 20)
    assert train.tokenizer_sha256 == valid.tokenizer_sha256
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        corpus.train_prefix.parent.name,
        f"{corpus.train_prefix.parent.name}.lock",
    }


def test_cached_corpus_needs_no_heavy_imports(library: Path, tmp_path: Path) -> None:
    builtin_corpus(tmp_path, 600)
    program = (
        "import sys; from relora_ds.data.builtin import builtin_corpus; "
        f"builtin_corpus({str(tmp_path)!r}, 600); "
        "print(sorted({'megatron', 'sentencepiece', 'torch', 'pyarrow'} & {*sys.modules}))"
    )
    root = Path(builtin.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def flip_last(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def exchange(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip_last, exchange, Path.unlink, lambda p: p.write_bytes(b"")])
@pytest.mark.parametrize(
    "name", ["train.bin", "valid.idx", "valid.json", "tokenizer.model", "train.json"]
)
def test_a_damaged_cache_is_built_again(
    small: Path, name: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    monkeypatch.setattr(builtin, "_build", lambda folder, vocab_size: built.append(folder))
    corpus = builtin_corpus(small, 600)
    assert not built
    before = contents(corpus)
    damage(corpus.train_prefix.with_name(name))
    builtin_corpus(small, 600)
    assert built == [corpus.train_prefix.parent]
    shutil.rmtree(built[0])
    built[0].mkdir()
    for file, content in before.items():
        (built[0] / file).write_bytes(content)


def test_a_cache_of_an_earlier_version_is_built_again(library: Path, tmp_path: Path) -> None:
    corpus = builtin_corpus(tmp_path, 600)
    expected = contents(corpus)
    for part in ("train", "valid"):
        path = corpus.train_prefix.with_name(f"{part}.json")
        record = json.loads(path.read_text())
        del record["contents"], record["record_sha256"]
        path.write_text(json.dumps(record))
    assert contents(builtin_corpus(tmp_path, 600)) == expected


BUILD = """
import sys
from relora_ds.data import builtin
builtin.sysconfig.get_path = lambda name: sys.argv[2]
builtin.builtin_corpus(sys.argv[1], 600)
"""


def test_a_build_that_is_killed_leaves_nothing_wrong(library: Path, tmp_path: Path) -> None:
    root, cache = Path(builtin.__file__).parents[2], tmp_path / "cache"
    for wanted in (
        ".builtin-*/*/train.jsonl",
        ".builtin-*/*/tokenizer.model",
        ".builtin-*/*/t*.json",
    ):
        command = [sys.executable, "-c", BUILD, str(cache), str(library)]
        with subprocess.Popen(command, cwd=root) as process:
            while process.poll() is None and not list(cache.glob(wanted)):
                time.sleep(0.002)
            process.kill()
    corpus = builtin_corpus(cache, 600)
    assert contents(corpus) == contents(builtin_corpus(tmp_path / "other", 600))
    name = corpus.train_prefix.parent.name
    assert {path.name for path in cache.iterdir()} == {name, f"{name}.lock"}


def test_python_without_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(DataError, match="holds only 0 characters of documentation"):
        builtin_corpus(tmp_path / "cache", 600)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"set data\.cache_dir to a folder"):
        builtin_corpus(tmp_path / "file", 600)


def test_lock_held_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_LOCK_SECONDS", 0.05)
    name = f"builtin-py{builtin.platform.python_version()}-v600-f1"
    with (
        builtin.filelock.FileLock(tmp_path / f"{name}.lock"),
        pytest.raises(DataError, match=r"held for 0\.05 s by another process"),
    ):
        builtin_corpus(tmp_path, 600)


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/relora_ds")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "relora_ds"


def test_a_user_without_a_home_is_told_where_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under some number."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    with pytest.raises(DataError, match=r"no home directory.* data\.cache_dir or XDG_CACHE_HOME"):
        default_cache_dir()


@pytest.mark.slow
def test_whole_corpus(tmp_path: Path) -> None:
    corpus = builtin_corpus(tmp_path, 2048)
    assert TokenFile(corpus.train_prefix).num_tokens > 500_000
    assert TokenFile(corpus.valid_prefix).num_tokens > 20_000
