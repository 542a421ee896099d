"""Steps and weights that are not to be believed, in whole runs that are also killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.faults import moments as at
from tests.faults import runs
from tests.faults.actions import EnlargeLeft, FlipBit
from tests.harness.faults import Call, Fault, Kill, Moment, Scale, Sleep
from tests.harness.jobs import End, run_job
from tests.harness.outcome import Outcome, difference, lines, outcome

pytestmark = pytest.mark.distributed

_LOSS = Moment("loss", Call("relora_ds.model.llama:Llama.forward", "after"))
_PRODUCT = Moment("product added", Call("relora_ds.engine.zero.weights:ZeroWeights.add_product"))
_SLOW_WRITE = Moment("slow write", Call("torch:save"))
_STEPS = {"steps": 15}
_KILL = Kill("job")


def nan(step: int, rank: int = 1) -> Fault:
    """The loss of a micro-batch is not a number on one rank."""
    return Fault(_LOSS, Scale(float("nan")), rank=rank, step=step)


def completed(run: runs.Run, end: End) -> Outcome:
    assert end.code == 0, end.said
    return outcome(run.output_dir)


def bad_steps(run: runs.Run) -> list[int]:
    """Steps in the file of bad batches, in its order."""
    path = run.output_dir / "logs" / "bad_batches.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def checkpoints(run: runs.Run) -> list[str]:
    return sorted(path.name for path in (run.output_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_flipped_bit_of_a_frozen_weight_is_not_saved(
    tiny_corpus: TinyCorpus, tmp_path: Path, stage: int
) -> None:
    run = runs.write("relora", tiny_corpus, tmp_path)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    end = run_job(run.arguments(), Fault(at.AFTER_UPDATE, FlipBit(), rank=1, step=14))
    assert end.struck == [at.AFTER_UPDATE.name]
    assert end.code == 6, end.said
    assert "down_proj.weight" in end.said
    assert "disagrees with the others" in end.said
    assert checkpoints(run) == ["step_12", "step_8"]


def test_a_merge_with_a_wrong_scale_is_not_saved(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = runs.write("relora", tiny_corpus, tmp_path, train={"precision": "fp32"})
    wrong = Fault(_PRODUCT, EnlargeLeft(1.5), step=12, again=True)
    end = run_job(run.arguments(), wrong, replace(wrong, rank=1))
    assert end.code == 5, end.said
    assert "merge: method/output_drift is" in end.said
    assert checkpoints(run) == ["step_4", "step_8"]
    assert not (run.output_dir / "hf").exists()


def test_a_kill_between_skips_changes_nothing(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Steps 9, 10 and 14 are skipped; the run is killed at 10 and after 14."""
    settings = {"guards": {"non_finite": "skip"}, "train": _STEPS}
    bad = [nan(9), nan(10, rank=0), nan(14)]
    whole = runs.write("relora", tiny_corpus, tmp_path / "whole", **settings)
    expected = completed(whole, run_job(whole.arguments(), *bad))
    assert lines(whole.output_dir)[-1]["guards/skipped_steps"] == 3
    run = runs.write("relora", tiny_corpus, tmp_path / "other", **settings)
    for step in (10, 14):
        end = run_job(run.arguments(), *bad, Fault(at.AFTER_UPDATE, _KILL, step=step))
        assert at.AFTER_UPDATE.name in end.struck
    found = completed(run, run_job(run.arguments(), *bad))
    assert difference(found, expected) == ""
    assert bad_steps(whole) == [9, 10, 14]
    assert sorted(bad_steps(run)) == [9, 10, 14]


def test_which_tensor_parallel_rank_finds_it_does_not_matter(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    found = []
    for rank in (0, 1):
        run = runs.write(
            "relora",
            tiny_corpus,
            tmp_path / str(rank),
            guards={"non_finite": "skip"},
            train=_STEPS | {"digest_every": 1},
            parallel={"tensor": 2},
        )
        found.append(completed(run, run_job(run.arguments(), nan(9, rank))))
        assert lines(run.output_dir)[-1]["guards/skipped_steps"] == 1
    assert difference(*found) == ""


def test_a_rollback_meets_a_save_in_the_background_and_a_kill(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Step 10 is left out after the run went back to step 8, whose save is still under way."""
    settings = {"guards": {"non_finite": "rollback"}, "train": _STEPS}
    run = runs.write("relora", tiny_corpus, tmp_path / "plain", **settings)
    expected = completed(run, run_job(run.arguments(), nan(10)))
    last = lines(run.output_dir)[-1]
    assert (last["guards/skipped_steps"], last["guards/rollbacks"]) == (1, 1)

    behind = {"checkpoint": {"every": 4, "keep": 2, "asynchronous": True}}
    run = runs.write("relora", tiny_corpus, tmp_path / "along", **settings, **behind)
    slow = Fault(_SLOW_WRITE, Sleep(1.0), step=None, again=True)
    end = run_job(run.arguments(), nan(10), slow)
    assert _SLOW_WRITE.name in end.struck
    found = completed(run, end)
    assert difference(replace(found, lines=[]), replace(expected, lines=[])) == ""
    assert bad_steps(run) == [10]

    run = runs.write("relora", tiny_corpus, tmp_path / "other", **settings)
    end = run_job(run.arguments(), nan(10), Fault(at.AFTER_UPDATE, _KILL, step=11))
    assert at.AFTER_UPDATE.name in end.struck
    found = completed(run, run_job(run.arguments(), nan(10)))
    assert difference(found, expected) == ""
    assert bad_steps(run) == [10]
