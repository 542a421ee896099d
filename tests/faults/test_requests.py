"""SIGTERM, a second start, a taken port, a loss that is none, keys: one job from outside."""

from __future__ import annotations

import math
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.faults import moments as at
from tests.faults import runs
from tests.faults.conftest import Unbroken
from tests.harness.faults import Fault, Scale, Signal, Sleep
from tests.harness.jobs import run_job, start_job
from tests.harness.outcome import difference, lines, outcome

pytestmark = pytest.mark.distributed

_CANARIES = {
    "WANDB_API_KEY": "canary-of-wandb-0123456789",
    "HF_TOKEN": "hf_canaryofthehub0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/of/the/store/0123456789",
}
_TYPED = (
    "canary/of/the/run/file-0123456789",
    "canary-of-a-refused-override-0123456789",
    "canary-of-an-override-0123456789",
    "canary-of-a-query-0123456789",
)
"""Credentials that a user types where they do not belong."""


def test_one_rank_is_asked_to_stop_at_any_moment(
    tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    """All ranks save the same step and leave with 75; nothing is lost by it."""
    run, request = runs.write("relora", tiny_corpus, tmp_path), Signal(signal.SIGTERM)
    for fault in (
        Fault(at.MID_ACCUMULATION, request, rank=1, step=2),
        Fault(at.SAVE_BEGINS, request, rank=1, step=4),
        Fault(at.BEFORE_TRANSITION, request, rank=1),
        Fault(at.BEFORE_EVALUATION, request, rank=1, step=8),
        Fault(at.IN_MERGE, request, rank=1, step=12),
        Fault(at.IN_SHARD, request, rank=1, step=16),
    ):
        end = run_job(run.arguments(), fault)
        assert end.struck == [fault.moment.name], end.said
        assert end.code == 75, end.said
        assert "Traceback" not in end.said
        last = lines(run.output_dir)[-1]["step"]
        assert (run.output_dir / "checkpoints" / "latest").read_text() == f"step_{last}"
    assert run_job(run.arguments()).code == 0
    assert difference(outcome(run.output_dir), unbroken("relora")) == ""


def test_a_save_in_the_background_and_an_export_are_asked_to_stop(
    tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    """The first is finished, and a later step saved; behind the last step there is only the end."""
    behind = {"every": 4, "keep": 2, "asynchronous": True}
    run = runs.write("relora", tiny_corpus, tmp_path, checkpoint=behind)
    request = Signal(signal.SIGTERM)
    for moment in (at.IN_SHARD, at.BEFORE_LATEST):
        end = run_job(run.arguments(), Fault(moment, request))
        assert end.struck == [moment.name], end.said
        assert end.code == 75, end.said
        assert "Traceback" not in end.said
        last = lines(run.output_dir)[-1]["step"]
        assert (run.output_dir / "checkpoints" / "latest").read_text() == f"step_{last}"
    end = run_job(run.arguments(), Fault(at.IN_EXPORT, request))
    assert end.struck == [at.IN_EXPORT.name], end.said
    assert end.code == 0, end.said
    assert difference(outcome(run.output_dir), unbroken("relora")) == ""


def test_the_second_of_two_starts_is_refused_and_the_first_goes_on(
    tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = runs.write("sltrain", tiny_corpus, tmp_path)
    first = start_job(run.arguments(), [Fault(at.MID_ACCUMULATION, Sleep(8.0), step=10)])
    while not (run.output_dir / "metrics.jsonl").is_file():
        time.sleep(0.05)
    second = run_job(run.arguments())
    assert second.code == 4, second.said
    assert "Traceback" not in second.said
    holders = [process.pid for process in first.processes()]
    assert any(f"process {pid} " in second.said for pid in holders), second.said
    assert first.finish().code == 0
    assert difference(outcome(run.output_dir), unbroken("sltrain")) == ""


def test_a_port_that_is_taken_is_named_in_one_line(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = runs.write("sltrain", tiny_corpus, tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        end = run_job(run.arguments(), MASTER_PORT=str(port))
    assert end.code == 2, end.said
    assert f"port {port} of this machine is in use" in end.said
    assert "--master_port" in end.said


def test_a_loss_that_is_no_number_on_one_rank_ends_all_and_the_last_checkpoint_stays(
    tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = runs.write("relora", tiny_corpus, tmp_path)
    end = run_job(run.arguments(), Fault(at.AFTER_FORWARD, Scale(math.nan), rank=1, step=11))
    assert end.struck == [at.AFTER_FORWARD.name]
    assert end.code == 5, end.said
    assert (run.output_dir / "checkpoints" / "latest").read_text() == "step_8"
    assert not (run.output_dir / "hf").exists()
    assert run_job(run.arguments()).code == 0
    assert difference(outcome(run.output_dir), unbroken("relora")) == ""


def test_credentials_are_nowhere_in_what_a_run_leaves(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    log = {"wandb": {"mode": "offline", "name": f"https://me:{_TYPED[0]}@host/x"}}
    run = runs.write("sltrain", tiny_corpus, tmp_path / "run", log=log)
    # told to stop, an error of the resume, one of the configuration, complete
    stop = Fault(at.MID_ACCUMULATION, Signal(signal.SIGTERM), rank=1, step=5)
    ends = [run_job(run.arguments(), stop, **_CANARIES)]
    ends.append(run_job(run.arguments("method.rank=8"), **_CANARIES))
    ends.append(run_job(run.arguments(f"log.wandb.api_key={_TYPED[1]}"), **_CANARIES))
    named = f"log.wandb.name=https://me:{_TYPED[2]}@host/x?token={_TYPED[3]}"
    ends.append(run_job(run.arguments(named), **_CANARIES))
    assert [end.code for end in ends] == [75, 4, 2, 0]
    typed_in = tmp_path / "run" / "run.yaml"
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != typed_in]
    left = [path.read_bytes() for path in written]
    left += [end.said.encode() for end in ends]
    assert len(left) > 20
    for canary in (*_CANARIES.values(), *_TYPED):
        found = [content for content in left if canary.encode() in content]
        assert not found, found[0][-2000:]
