"""However a rank ends, the job ends: with the cause, in time, with its code, and leaving nobody."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.ranks import meeting_point, place, rank_environment, warm_process
from tests.harness.run import write_run
from tests.harness.warm import Script, Start

pytestmark = pytest.mark.distributed

_TIMEOUT_MINUTES, _PATIENCE_MINUTES = 5.0, 0.25
"""For a collective, and for a rank, which is given up after three quarters of it: it is never a
collective that notices."""
_UNREACHABLE_MINUTES = 0.1


@dataclass(frozen=True)
class End:
    """How a job ended: exit codes and output by rank, and how long it took."""

    codes: list[int | None]
    said: list[str]
    seconds: float

    def last_line(self, rank: int) -> str:
        return self.said[rank].rstrip().splitlines()[-1]


def _end(run: dict[str, Any], tmp_path: Path, end: str, ranks: int) -> End:
    run["train"] |= {"steps": 5000, "timeout_minutes": _TIMEOUT_MINUTES}
    run["checkpoint"], run["eval"] = {"every": 0}, {"every": 0, "batches": 1}
    description = write_run(run, tmp_path / "run.yaml")
    environment = rank_environment() | meeting_point()
    environment |= {"END": end, "PATIENCE_MINUTES": str(_PATIENCE_MINUTES)}
    job = Script("tests/distributed/pretrain_that_ends.py", (str(description),))
    outputs = [tmp_path / f"rank_{rank}.txt" for rank in range(ranks)]
    starts = [
        Start(job, environment | place(rank, ranks), str(output))
        for rank, output in enumerate(outputs)
    ]
    begun = time.monotonic()
    warm = warm_process()
    processes = warm.start(starts)
    codes = warm.wait(processes, 120).codes
    assert not any(psutil.pid_exists(process) for process in processes)
    return End(codes, [output.read_text() for output in outputs], time.monotonic() - begun)


def _reports(run: dict[str, Any]) -> dict[int, dict[str, Any]]:
    paths = Path(run["output_dir"]).glob("logs/error_rank_*.json")
    found = [json.loads(path.read_text()) for path in paths]
    return {report["rank"]: report for report in found}


@pytest.mark.parametrize(("ranks", "failing"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_the_error_of_a_rank_is_the_error_of_the_job(
    tiny_run: dict[str, Any], tmp_path: Path, ranks: int, failing: int
) -> None:
    """Although destroying the process group takes for ever, as it does under NCCL."""
    end = _end(tiny_run, tmp_path, f"raise {failing} 3", ranks)
    cause = f"ROOT CAUSE rank {failing} (step 3: between its parts): ZeroDivisionError: on purpose"
    assert end.codes[failing] == 1
    assert "in _fail" in end.said[failing], "the traceback is kept"
    assert end.last_line(failing) == f"{cause} (exit code 1)"
    others = [rank for rank in range(ranks) if rank != failing]
    assert [end.codes[rank] for rank in others] == [7] * len(others)
    if others:
        assert end.last_line(others[0]).endswith(f"{cause} (exit code 1)")
        assert all("ROOT CAUSE" not in end.said[rank] for rank in others[1:]), "one speaks for all"
    reports = _reports(tiny_run)
    assert sorted(reports) == list(range(ranks))
    assert {rank: report["exit_code"] for rank, report in reports.items()} == dict(
        enumerate(end.codes)
    )
    assert {report["root_cause"]["rank"] for report in reports.values()} == {failing}


@pytest.mark.parametrize("late", [0, 1])
def test_what_all_ranks_find_is_said_once(
    tiny_run: dict[str, Any], tmp_path: Path, late: int
) -> None:
    end = _end(tiny_run, tmp_path, f"tell {late} 3", 2)
    assert end.codes == [4, 4]
    assert "".join(end.said).count("ROOT CAUSE") == 1, end.said
    assert "".join(end.said).count("told to all ranks (exit code 4)") == 1


@pytest.mark.parametrize(("ranks", "killed"), [(2, 0), (4, 2)])
def test_a_killed_rank_is_named_by_the_others(
    tiny_run: dict[str, Any], tmp_path: Path, ranks: int, killed: int
) -> None:
    end = _end(tiny_run, tmp_path, f"kill {killed} 3", ranks)
    assert end.codes == [-9 if rank == killed else 7 for rank in range(ranks)]
    speaker = 1 if killed == 0 else 0
    line = end.last_line(speaker)
    assert line.startswith(f"rank {speaker} ends with exit code 7; ROOT CAUSE")
    assert f"rank {speaker}: lost contact with another rank" in end.said[speaker]
    assert f"ROOT CAUSE rank {killed} (" in line
    assert "killed by a signal" in line


@pytest.mark.parametrize(("ranks", "stopped"), [(2, 0), (4, 2)])
def test_a_stopped_rank_is_given_up_and_not_left_behind(
    tiny_run: dict[str, Any], tmp_path: Path, ranks: int, stopped: int
) -> None:
    """It says nothing, and others wait for it: whichever is noticed first, it is named."""
    end = _end(tiny_run, tmp_path, f"stop {stopped} 3", ranks)
    assert end.codes == [-9 if rank == stopped else 7 for rank in range(ranks)]
    speaker = 1 if stopped == 0 else 0
    line = end.last_line(speaker)
    assert f"ROOT CAUSE rank {stopped} (" in line
    assert "did not answer for" in line or "no progress for" in line
    assert f"stacks of rank {speaker} in 'step 3: " in end.said[speaker]
    assert "in train_step" in end.said[speaker], "the stack of the thread that waits"


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_rank_that_waits_for_ever_is_named(
    tiny_run: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    stuck = ranks // 2
    end = _end(tiny_run, tmp_path, f"wait {stuck} 3", ranks)
    assert end.codes == [7] * ranks
    line = end.last_line(0)
    assert f"ROOT CAUSE rank {stuck} (step 3: between its parts): no progress for" in line
    for rank in range(ranks):
        assert f"stacks of rank {rank} in 'step 3: " in end.said[rank]
    assert "in _wait" in end.said[stuck]
    assert end.seconds < 60 * _TIMEOUT_MINUTES, "no collective had to fail for it"


@pytest.mark.parametrize(
    ("rank", "host", "told"),
    [
        pytest.param(1, "no-such-host.invalid", "has no known address", id="unknown host"),
        pytest.param(1, "127.0.0.1", "nobody answers at 127.0.0.1:", id="refused connection"),
        pytest.param(0, "127.0.0.1", "is in use", id="port in use"),
    ],
)
def test_ranks_that_cannot_meet_say_so_in_one_line(
    tiny_run: dict[str, Any], tmp_path: Path, rank: int, host: str, told: str
) -> None:
    tiny_run["train"]["timeout_minutes"] = _UNREACHABLE_MINUTES
    description = write_run(tiny_run, tmp_path / "run.yaml")
    output = tmp_path / "output.txt"
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("", 0))
        meeting = {"MASTER_ADDR": host, "MASTER_PORT": str(taken.getsockname()[1])}
        if rank == 0:
            taken.listen()
        job = Script("launch/pretrain.py", (str(description),))
        here = place(rank, 2) | {"LOCAL_RANK": "0"}  # each on a node of its own
        environment = rank_environment() | here | meeting
        warm = warm_process()
        codes = warm.wait(warm.start([Start(job, environment, str(output))]), 60).codes
    said = output.read_text()
    assert codes == [2], said
    assert "Traceback" not in said
    assert said.count("ROOT CAUSE") == 1
    line = said.rstrip().splitlines()[-1]
    assert line.startswith(f"ROOT CAUSE rank {rank} (start): "), said
    assert told in line


def test_the_end_of_a_complete_run_does_not_wait_for_ever(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has written everything: a process group that is not destroyed is no failure."""
    from relora_ds.train.lifetime import lifetime

    left: list[int] = []
    monkeypatch.setattr(lifetime, "_GOODBYE_S", 0.1)
    monkeypatch.setattr(lifetime.Lifetime, "_leave", lambda self, code: left.append(code))
    monkeypatch.setattr("relora_ds.engine.distributed.stop", lambda: time.sleep(1.0))
    lifetime.Lifetime().finish()
    assert left == [0]
