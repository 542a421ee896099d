"""Space and permission are looked at before training."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from relora_ds.checkpoint.saving.agreement import Agreement
from relora_ds.checkpoint.saving.problem import Problem, explain, size
from relora_ds.checkpoint.saving.room import check_room, free_bytes
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology

ALONE = Topology(0, 1, 0, torch.device("cpu"))


def test_room_is_found_and_nothing_stays(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    free = check_room(directory, 10, Agreement(1), ALONE)
    assert free is not None
    assert free > 10
    assert list(directory.iterdir()) == []


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"rank 0: .*Read-only file system; make the dir"):
        check_room(tmp_path, 10, Agreement(1), ALONE)


def test_a_probe_that_cannot_be_filled_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(CheckpointError, match=r"rank 0: .*No space left on device; free some"):
        check_room(tmp_path, 10, Agreement(1), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be saved: .*File exists"):
        check_room(tmp_path / "checkpoints", 10, Agreement(1), ALONE)


def test_what_cannot_be_asked_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == free_bytes(tmp_path)
    full = SimpleNamespace(f_bavail=0, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert free_bytes(tmp_path) == 0

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "statvfs", refuse)
    assert free_bytes(tmp_path) is None
    assert check_room(tmp_path, 1 << 60, Agreement(1), ALONE) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "takes about 2.0 MB and 500.0"),
        (OSError(errno.EACCES, "Permission denied", "a.pt"), "make the directory writable"),
        (MemoryError(), "set checkpoint.asynchronous to false"),
        (RuntimeError("odd"), "rank 3: RuntimeError: odd"),
    ],
)
def test_a_problem_in_words(error: Exception, words: str) -> None:
    problems = [Problem.of(error, 3), Problem.of(error, 4)]
    text = explain(7, problems, 2_000_000, 500_000, Path("step_5"))
    assert words in text
    assert "no checkpoint of step 7 was saved: rank 3: " in text
    assert "(and 1 more)" in text
    assert text.endswith("step_5 is complete")


def test_bytes_for_a_reader() -> None:
    assert [size(n) for n in (7, 1_500, 2_000_000, 3_100_000_000)] == [
        "7 bytes",
        "1.5 kB",
        "2.0 MB",
        "3.1 GB",
    ]
