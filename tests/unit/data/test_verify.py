"""Reading everything: the same result however it is shared out, and every alteration is refused."""

from __future__ import annotations

import random
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relora_ds.config.sections import DataConfig
from relora_ds.data.prepare import prepare
from relora_ds.data.source import open_corpus
from relora_ds.data.token_files import contents
from relora_ds.data.token_files.contents import join_reports, read_blocks, read_contents
from relora_ds.data.token_files.metadata import TokenFileMetadata, read_metadata
from relora_ds.data.tokenizer import Tokenizer
from relora_ds.data.tokens import TokenFile
from relora_ds.data.verify import verify_contents
from relora_ds.errors import DataError

UINT16 = np.dtype(np.uint16)
SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture
def prepared(text_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> str:
    """Prefix of a token file of several small blocks."""
    prepare([text_file], tokenizer.path, tmp_path / "corpus")
    return str(tmp_path / "corpus")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "BLOCK_BYTES", 256)
    monkeypatch.setattr(contents, "_PIECE_BYTES", 64)


class Processes:
    """Threads that call a collective function as ranks do."""

    def __init__(self, hosts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._values: list[Any] = [None] * len(hosts)
        self._barrier = threading.Barrier(len(hosts), timeout=20)
        self._rank = threading.local()
        self._count = len(hosts)
        monkeypatch.setattr(socket, "gethostname", lambda: hosts[self._rank.value])

    def gather(self, value: Any) -> list[Any]:
        self._values[self._rank.value] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work` returns or raises as a DataError on every rank."""

        def one(rank: int) -> Any:
            self._rank.value = rank
            try:
                return work(rank)
            except DataError as error:
                return str(error)

        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(one, range(self._count)))


@pytest.mark.usefixtures("small_blocks")
def test_the_result_does_not_depend_on_how_the_work_is_shared(prepared: str) -> None:
    whole = read_contents(prepared, UINT16)
    tokens = np.fromfile(f"{prepared}.bin", UINT16)
    assert tokens.nbytes > 20 * 256
    assert (whole.smallest, whole.largest) == (0, tokens.max())
    for parts in (1, 2, 3, 7, 50, 1000):
        shared = [read_blocks(prepared, UINT16, part, parts, threads=3) for part in range(parts)]
        assert join_reports(shared) == whole


@pytest.mark.usefixtures("small_blocks")
def test_processes_of_a_host_share_the_reading(
    prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    inner = TokenFile.examine

    def examine(self: TokenFile, part: int = 0, parts: int = 1) -> Any:
        read.append((part, parts))
        return inner(self, part, parts)

    monkeypatch.setattr(TokenFile, "examine", examine)
    processes = Processes(["a", "b", "a"], monkeypatch)
    files = [(TokenFile(prepared), TokenFile(prepared)) for _ in range(3)]
    done = processes.run(lambda rank: verify_contents(files[rank], rank, processes.gather))
    assert done == [None] * 3
    # the file is there twice and is read once on each host
    assert sorted(read) == [(0, 1), (0, 2), (1, 2)]
    assert len({file.fingerprint for pair in files for file in pair}) == 1
    assert len(read) == 3


def test_all_processes_hear_of_one_that_cannot_read(
    prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(["a", "b"], monkeypatch)
    files = [TokenFile(prepared) for _ in range(2)]
    monkeypatch.setattr(files[1], "examine", lambda *_: TokenFile(f"{prepared}-gone"))
    done = processes.run(lambda rank: verify_contents([files[rank]], rank, processes.gather))
    assert done[0] == done[1]
    assert done[0].startswith(f"host b: {prepared}-gone.bin: cannot be read: No such file")


def test_hosts_must_hold_the_same_file(
    write_tokens: Callable[..., TokenFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = write_tokens([[1, 2, 3]]), write_tokens([[1, 2, 4]], "other")
    other.prefix = one.prefix
    processes = Processes(["a", "b"], monkeypatch)
    monkeypatch.setattr(other, "examine", lambda *_: read_blocks(one.prefix[:-6] + "other", UINT16))
    done = processes.run(lambda rank: verify_contents([(one, other)[rank]], rank, processes.gather))
    assert done[0] == done[1]
    assert "is another file on host b than on host a" in done[0]


def test_an_id_in_the_middle_is_found_whatever_the_record_says(
    write_tokens: Callable[..., TokenFile],
) -> None:
    ids = [7] * 3_000_000
    ids[1_500_000] = 60_000
    corpus = open_corpus(DataConfig(train=write_tokens([ids]).prefix))
    verify_contents(corpus.files)
    with pytest.raises(DataError, match=r"token id 60000, .* is token 1500000\)"):
        corpus.check_vocabulary(512)


def test_a_record_of_an_earlier_version_is_checked_as_far_as_it_goes(prepared: str) -> None:
    record = read_metadata(prepared)
    assert record is not None
    earlier = record.model_copy(update={"contents": None, "record_sha256": None})
    old = {"contents", "record_sha256"}
    path = Path(f"{prepared}.json")

    def write(record: TokenFileMetadata) -> None:
        path.write_text(record.model_dump_json(exclude=old))

    write(earlier)
    file = TokenFile(prepared)
    assert file.fingerprint == record.contents.fingerprint  # pyright: ignore[reportOptionalMemberAccess]
    assert not TokenFile(prepared).trust_record()
    write(earlier.model_copy(update={"max_token_id": record.max_token_id - 1}))
    with pytest.raises(DataError, match=r"largest id: \d+ recorded"):
        verify_contents([TokenFile(prepared)])
    write(earlier.model_copy(update={"fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"beginning or end differ"):
        verify_contents([TokenFile(prepared)])


def test_checkpoints_of_earlier_versions_know_files_by_their_ends(prepared: str) -> None:
    corpus = open_corpus(DataConfig(train=prepared, valid=prepared))
    ends, whole = corpus.files[0].ends_fingerprint(), corpus.files[0].fingerprint
    assert corpus.fingerprints() == corpus.fingerprints([whole, whole]) == (whole, whole)
    assert corpus.fingerprints([ends, whole]) == (ends, whole)
    assert corpus.fingerprints([ends]) == (ends, whole)
    assert read_metadata(prepared).fingerprint == ends  # pyright: ignore[reportOptionalMemberAccess]


def test_the_ends_alone_when_asked_for(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_SAMPLE_BYTES", 64)
    record = read_metadata(prepared)
    assert record is not None
    ends = record.model_copy(update={"fingerprint": contents.ends_fingerprint(prepared)}).sealed()
    ends.save(f"{prepared}.json")
    whole = TokenFile(prepared).fingerprint
    flip(Path(f"{prepared}.bin"), 1000, 1)
    file = TokenFile(prepared)
    verify_contents([file], whole=False)
    assert (file.fingerprint, file.max_token_id) == (whole, record.max_token_id)
    with pytest.raises(DataError, match=r"bin: is not the file .* SHA-256 differs"):
        verify_contents([TokenFile(prepared)])
    flip(Path(f"{prepared}.bin"), 10, 1)
    with pytest.raises(DataError, match=r"bin: is not the file .* beginning or end differ"):
        verify_contents([TokenFile(prepared)], whole=False)


def flip(path: Path, offset: int, bits: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= bits
    path.write_bytes(content)


def alter(path: Path, draw: random.Random) -> str:
    """Change a file somehow; returns how."""
    content = bytearray(path.read_bytes())
    size = len(content)
    start = draw.randrange(size)
    stop = min(size, start + draw.choice((1, 2, 8, 100, 4096)))
    how = draw.choice(("flip", "byte", "zero", "ones", "cut", "insert", "remove", "swap", "grow"))
    if how == "flip":
        content[start] ^= 1 << draw.randrange(8)
    elif how == "byte":
        content[start] = draw.randrange(256)
    elif how == "zero":
        content[start:stop] = bytes(stop - start)
    elif how == "ones":
        content[start:stop] = b"\xff" * (stop - start)
    elif how == "cut":
        del content[start:]
    elif how == "insert":
        content[start:start] = draw.randbytes(stop - start)
    elif how == "remove":
        del content[start:stop]
    elif how == "swap":
        middle = size // 2
        content[:] = content[middle:] + content[:middle]
    else:
        content += draw.randbytes(draw.choice((1, 2, 12, 20)))
    path.write_bytes(content)
    return f"{how} {start}:{stop} of {path.name}"


def opened(prefix: Path) -> tuple[TokenFile | None, str]:
    """The token file once it is verified, or why it is not used."""
    try:
        file = TokenFile(prefix)
        verify_contents([file])
    except DataError as error:
        return None, str(error)
    return file, ""


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 300), pytest.param(2, 3000, marks=pytest.mark.slow)]
)
def test_every_alteration_is_refused_or_changes_nothing(
    prepared: str, tmp_path: Path, seed: int, count: int
) -> None:
    draw = random.Random(seed)
    before = TokenFile(prepared)
    tokens = before.window(0, before.num_tokens)
    record, copy = before.metadata, tmp_path / "copy" / "tokens"
    copy.parent.mkdir()
    refused = 0
    for _ in range(count):
        for suffix in SUFFIXES:
            shutil.copyfile(prepared + suffix, f"{copy}{suffix}")
        how = alter(Path(f"{copy}{draw.choice(SUFFIXES)}"), draw)
        file, problem = opened(copy)
        if file is None:
            assert f"{copy}." in problem, how
            assert len(problem) < 1000, how
            refused += 1
            continue
        assert file.metadata == record, how
        assert np.array_equal(file.window(0, file.num_tokens), tokens), how
    assert refused > 0.9 * count


BOUNDS = {
    "backwards": [0, 2, 1, 3],
    "not from the start": [1, 1, 2, 3],
    "not to the end": [0, 1, 2, 2],
    "beyond the end": [0, 9, 3, 3],
    "negative": [0, -1, 2, 3],
}


@pytest.mark.parametrize("name", BOUNDS)
def test_document_bounds_of_files_without_a_record(
    write_tokens: Callable[..., TokenFile], name: str
) -> None:
    prefix = write_tokens([[1, 2], [3, 2], [4, 2]]).prefix
    path = Path(f"{prefix}.idx")
    bounds = np.array(BOUNDS[name], np.int64).tobytes()
    path.write_bytes(path.read_bytes()[: -len(bounds)] + bounds)
    with pytest.raises(DataError, match=r"idx: damaged document bounds"):
        TokenFile(prefix)


def test_files_of_others_need_no_record(write_tokens: Callable[..., TokenFile]) -> None:
    file = write_tokens([[1, 2], [3, 2]])
    verify_contents([file], whole=False)
    assert (file.metadata, file.max_token_id) == (None, 3)
