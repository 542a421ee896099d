"""One run per output directory: who is refused, who is not, and what a crash leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.train.lifetime.lock import NAME, OutputLock

_HOLDER = """
import sys, time
from pathlib import Path
from relora_ds.train.lifetime.lock import OutputLock
OutputLock(Path(sys.argv[1]), print, beat_s=0.05).take()
print("held", flush=True)
time.sleep(60)
"""


def _lock(directory: Path, lost: list[str] | None = None) -> OutputLock:
    return OutputLock(directory, (lost or []).append, beat_s=0.05, patience_s=0.5)


def _hold_elsewhere(directory: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def _pretend(directory: Path, **who: Any) -> dict[str, Any]:
    """Make the record in the file say something else of its holder."""
    record = json.loads((directory / NAME).read_bytes())
    record["who"] |= who
    (directory / NAME).write_text(json.dumps(record).ljust(1024))
    return record


def test_the_second_is_told_who_holds_it_and_touches_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    holder = _hold_elsewhere(directory)
    with pytest.raises(CheckpointError) as refused:
        _lock(directory).take()
    found = re.search(r"process (\d+) on (\S+) since \d{4}-", str(refused.value))
    assert found is not None
    assert int(found[1]) == holder.pid
    assert [path.name for path in directory.iterdir()] == [NAME]
    assert json.loads((directory / NAME).read_bytes())["who"]["pid"] == holder.pid
    holder.kill()
    holder.wait()


def test_a_killed_holder_does_not_stand_in_the_way(tmp_path: Path) -> None:
    holder = _hold_elsewhere(tmp_path)
    holder.kill()
    holder.wait()
    begun, lock = time.monotonic(), _lock(tmp_path)
    assert f"process {holder.pid} " in str(lock.take())
    assert time.monotonic() - begun < 0.4, "the process is known to be dead: nothing to wait for"
    lock.release()


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    holder = _hold_elsewhere(tmp_path)
    holder.kill()
    holder.wait()
    _pretend(tmp_path, pid=os.getpid())  # which is alive, and was born at another time
    lock = _lock(tmp_path)
    assert lock.take() is not None
    lock.release()


def test_released_means_gone(tmp_path: Path) -> None:
    for _ in range(2):
        lock = _lock(tmp_path)
        assert lock.take() is None
        lock.release()
        assert list(tmp_path.iterdir()) == []


def test_a_dead_holder_on_another_machine_is_waited_for_and_replaced(tmp_path: Path) -> None:
    """Whatever its clock said: the date is no evidence."""
    holder = _hold_elsewhere(tmp_path)
    holder.kill()
    holder.wait()
    record = _pretend(tmp_path, machine="another", host="node-7")
    os.utime(tmp_path / NAME, (2e9, 2e9))
    begun, lock = time.monotonic(), _lock(tmp_path)
    assert "on node-7" in str(lock.take())
    assert time.monotonic() - begun > 0.4
    assert json.loads((tmp_path / NAME).read_bytes())["token"] != record["token"]
    lock.release()


def test_a_live_holder_on_another_machine_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its lock of the system is not seen here, and its last beat seems long ago."""
    directory = tmp_path / "run"
    holder = _hold_elsewhere(directory)
    monkeypatch.setattr("fcntl.flock", lambda file, operation: None)
    monkeypatch.setattr("relora_ds.train.lifetime.link.machine", lambda: "another")
    os.utime(directory / NAME, (0, 0))
    with pytest.raises(CheckpointError, match="another run writes there"):
        _lock(directory).take()
    holder.kill()
    holder.wait()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    first = _lock(tmp_path)
    assert first.take() is None
    with pytest.raises(CheckpointError):
        _lock(tmp_path).take()
    first.release()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[1]", b'{"who": 1}', b"[" * 1000])
def test_what_a_crash_left_is_no_holder(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    lock = _lock(tmp_path)
    assert lock.take() is None
    lock.release()


def test_a_holder_learns_that_it_was_replaced(tmp_path: Path) -> None:
    lost: list[str] = []
    lock = OutputLock(tmp_path, lost.append, beat_s=0.05)
    lock.take()
    record = json.loads((tmp_path / NAME).read_bytes())
    (tmp_path / NAME).write_text(json.dumps(record | {"token": "theirs"}))
    deadline = time.monotonic() + 10
    while not lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "taken over" in lost[0]
    lock.release()
    assert (tmp_path / NAME).exists(), "it is theirs"


def test_a_directory_that_cannot_be_written_is_a_mistake_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose an output_dir"):
        _lock(tmp_path / "file" / "run").take()


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.timeout(10)
def test_nothing_but_a_file_of_its_own_is_written_to(tmp_path: Path, kind: str) -> None:
    others = tmp_path / "others"
    others.write_text("theirs")
    if kind == "link":
        (tmp_path / NAME).symlink_to(others)
    else:
        os.mkfifo(tmp_path / NAME)
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path / NAME}: it is a {kind}"):
        _lock(tmp_path).take()
    assert others.read_text() == "theirs"
