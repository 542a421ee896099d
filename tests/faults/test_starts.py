"""Starts that meet each other, a run that is no longer there, and work that takes long."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relora_ds.train.lifetime.link import Identity
from relora_ds.train.lifetime.lock import NAME
from tests.conftest import TinyCorpus
from tests.faults import moments as at
from tests.faults import runs
from tests.faults.conftest import Unbroken
from tests.harness.faults import Fault, Seen, Sleep
from tests.harness.jobs import run_job
from tests.harness.outcome import difference, outcome
from tests.harness.run import metrics, start, write_run

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Remove:
    """Somebody removes a directory."""

    path: Path

    def __call__(self, seen: Seen) -> None:
        shutil.rmtree(self.path)


def test_the_same_command_twice(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Processes of their own: the second leaves before it has touched anything."""
    tiny_run["train"]["steps"] = 100_000
    tiny_run["checkpoint"] = {"every": 10, "keep": 2}
    tiny_run["eval"] = {"every": 0, "batches": 1}
    description = write_run(tiny_run, tmp_path / "run.yaml")
    output_dir = Path(tiny_run["output_dir"])
    with start([str(description)]) as first:
        deadline = time.monotonic() + 240
        while not ((output_dir / "metrics.jsonl").is_file() and metrics(output_dir)):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.1)
        second = start([str(description)])
        said, _ = second.communicate(timeout=240)
        assert second.returncode == 4, said
        assert "Traceback" not in said
        assert f"another run writes there: process {first.pid} on " in said
        first.terminate()
        first_said, _ = first.communicate(timeout=120)
    assert first.returncode == 75, first_said
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "no line is missing or doubled"
    assert (output_dir / "checkpoints" / "latest").read_text() == f"step_{steps[-1]}"
    assert not list(tmp_path.glob("run/previous_*"))


@pytest.mark.slow  # half a minute passes until a holder of another machine counts as dead
def test_a_lock_that_a_dead_host_has_left(
    tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = runs.write("sltrain", tiny_corpus, tmp_path)
    run.output_dir.mkdir()
    elsewhere = Identity(0, "node-7", 4711, "1", "another machine")
    record = {"who": vars(elsewhere), "since": "yesterday", "token": "0" * 16, "count": 12}
    (run.output_dir / NAME).write_text(json.dumps(record).ljust(1024))
    end = run_job(run.arguments())
    assert end.code == 0, end.said
    assert "left behind by process 4711 on node-7" in end.said
    assert difference(outcome(run.output_dir), unbroken("sltrain")) == ""


@pytest.mark.parametrize("lost", ["", "checkpoints", "logs"])
def test_a_directory_that_is_removed_under_a_run(
    tiny_corpus: TinyCorpus, tmp_path: Path, lost: str
) -> None:
    """It ends with a sentence, or goes on and writes all that comes; never as if nothing were."""
    run = runs.write("sltrain", tiny_corpus, tmp_path)
    end = run_job(run.arguments(), Fault(at.AFTER_UPDATE, Remove(run.output_dir / lost), step=6))
    assert end.struck
    assert "Traceback" not in end.said
    if end.code == 0:
        assert lost, "a run without its metrics is not complete"
        assert outcome(run.output_dir).status == "completed"
    else:
        assert "ROOT CAUSE" in end.said
        assert str(run.output_dir) in end.said.splitlines()[-1]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(at.EXPORT_BEGINS, id="export"),
        pytest.param(at.BEFORE_MANIFEST, id="manifest", marks=pytest.mark.slow),
        pytest.param(at.BEFORE_SUMMARY, id="summary", marks=pytest.mark.slow),
        pytest.param(at.BEFORE_RESTORE, id="resume", marks=pytest.mark.slow),
    ],
)
def test_work_of_one_rank_may_take_longer_than_a_collective(
    moment: at.Moment, tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    """The others wait for as long as it takes: hashing and copying a large model takes minutes."""
    run = runs.write("sltrain", tiny_corpus, tmp_path, train={"timeout_minutes": 0.25})
    if moment in at.RESUMED_ONLY:
        end = run_job(run.arguments(), Fault(at.AFTER_UPDATE, step=6))
        assert end.code != 0
    end = run_job(run.arguments(), Fault(moment, Sleep(17.0)))
    assert end.struck == [moment.name]
    assert end.code == 0, end.said
    assert difference(outcome(run.output_dir), unbroken("sltrain")) == ""
