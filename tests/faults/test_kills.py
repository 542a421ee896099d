"""SIGKILL at named moments: nothing is left running, and the run that goes on is the unbroken one.

By default a run of every method is killed, resumed, killed at its next moment, and so on. After
every kill its metrics are a beginning of the unbroken run's, and in the end all results are its.
The whole matrix, a run for every victim at every moment, is behind `-m slow`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.faults import moments as at
from tests.faults import runs
from tests.faults.conftest import Unbroken
from tests.harness.faults import Fault, Kill
from tests.harness.jobs import run_job
from tests.harness.outcome import Outcome, difference, lines, outcome

pytestmark = pytest.mark.distributed

_JOB, _RANK, _LAUNCHER = Kill("job"), Kill("rank"), Kill("launcher")

# In the order in which a run meets them: a checkpoint follows every fourth update, and one that was
# complete when its writer was killed is found and used.
_FIRST = (
    Fault(at.STARTED, _JOB),
    Fault(at.MID_ACCUMULATION, _JOB, rank=1, step=3),
    Fault(at.SAVE_BEGINS, _RANK, rank=1, step=4),
    Fault(at.IN_SHARD, _JOB, step=4),
    Fault(at.BETWEEN_SHARDS, _JOB, step=4),
    Fault(at.AFTER_BACKWARD, _JOB, rank=1, step=6),
    Fault(at.BEFORE_EVALUATION, _RANK, rank=1, step=8),
    Fault(at.BEFORE_SIDE_FILES, _JOB, step=8),
    Fault(at.BEFORE_MANIFEST, _JOB, step=8),
    Fault(at.BEFORE_RENAME, _JOB, step=8),
)
_LAST = (
    Fault(at.BEFORE_RESTORE, _JOB),
    Fault(at.AFTER_RESTORE, _JOB, rank=1),
    Fault(at.IN_OPTIMIZER, _JOB, step=14),
    Fault(at.AFTER_LINE, _JOB, step=15),
    Fault(at.AFTER_EVALUATION, _JOB, rank=1, step=16),
    Fault(at.BEFORE_LATEST, _JOB, step=16),
    Fault(at.BEFORE_PRUNING, _JOB, step=20),
    Fault(at.AFTER_UPDATE, _LAUNCHER, step=22),
    Fault(at.IN_PRUNING, _JOB, step=24),
    Fault(at.EXPORT_BEGINS, _JOB),
    Fault(at.IN_EXPORT, _RANK),
    Fault(at.EXPORT_UNNAMED, _JOB),
    Fault(at.BEFORE_PLOT, _JOB),
    Fault(at.BEFORE_SUMMARY, _JOB),
)
_OWN = {
    "relora": (
        Fault(at.BEFORE_TRANSITION, _RANK),
        Fault(at.NEW_ENGINE, _JOB),
        Fault(at.AFTER_TRANSITION, _JOB, rank=1),
        Fault(at.MERGE_BEGINS, _JOB, step=12),
        Fault(at.IN_MERGE, _RANK, rank=1, step=12),
        Fault(at.BEFORE_RESET, _JOB, step=12),
        Fault(at.AFTER_MERGE, _LAUNCHER, step=12),
    ),
    "switchlora": (
        Fault(at.SWITCH_BEGINS, _JOB, step=10),
        Fault(at.IN_SWITCH, _RANK, rank=1, step=10),
        Fault(at.AFTER_SWITCH, _LAUNCHER, step=11),
    ),
    "sltrain": (),
}
_IN_BACKGROUND = (
    at.IN_COPY,
    at.IN_SHARD,
    at.BETWEEN_SHARDS,
    at.BEFORE_MANIFEST,
    at.BEFORE_RENAME,
    at.BEFORE_LATEST,
    at.BEFORE_PRUNING,
    at.IN_PRUNING,
)
_TAKEN = {
    "relora": (slice(0, 6, 2), slice(0, None, 2)),  # its transition comes before update 8
    "switchlora": (slice(1, None, 2), slice(1, None, 2)),
    "sltrain": (slice(4, None, 2), slice(None)),
}
"""Which moments of the first and last updates a method is tried at by default: all, together."""


def _chain(method: str) -> Sequence[Fault]:
    first, last = _TAKEN[method]
    return (*_FIRST[first], *_OWN[method], *_LAST[last])


def _matrix() -> Iterator[tuple[str, Fault]]:
    """Every victim at every moment of every method."""
    for method in runs.METHODS:
        for fault in (*_FIRST, *_OWN[method], *_LAST):
            ranks = (0,) if fault.moment in at.MAIN_ONLY else (0, 1)
            for rank in ranks:
                yield method, replace(fault, action=_RANK, rank=rank)
            yield method, replace(fault, action=_JOB)
            yield method, replace(fault, action=_LAUNCHER)


_USUAL, *_OTHERS = runs.METHODS


@pytest.mark.parametrize(
    "method", [_USUAL, *(pytest.param(other, marks=pytest.mark.slow) for other in _OTHERS)]
)
def test_a_run_that_is_killed_again_and_again_is_the_unbroken_one(
    method: str, tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    chain = _chain(method)
    assert len(chain) >= 14
    run = runs.write(method, tiny_corpus, tmp_path)
    for fault in chain:
        _break(run, fault, unbroken(method))
    _complete(run, unbroken(method))


@pytest.mark.parametrize(
    "method", ["relora", *(pytest.param(m, marks=pytest.mark.slow) for m in runs.METHODS[1:])]
)
def test_a_save_in_the_background_may_be_killed_at_any_moment(
    method: str, tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    """Whatever the next updates are doing meanwhile: the first save of a process is struck."""
    run = runs.write(method, tiny_corpus, tmp_path, checkpoint={"asynchronous": True})
    for moment in _IN_BACKGROUND:
        _break(run, Fault(moment, _JOB), unbroken(method))
    _complete(run, unbroken(method))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fault"), list(_matrix()), ids=str)
def test_a_run_that_is_killed_once_is_the_unbroken_one(
    method: str, fault: Fault, tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = runs.write(method, tiny_corpus, tmp_path)
    if fault.moment in at.RESUMED_ONLY:
        _break(run, Fault(at.AFTER_UPDATE, _JOB, step=6), unbroken(method))
    _break(run, fault, unbroken(method))
    _complete(run, unbroken(method))


def _break(run: runs.Run, fault: Fault, expected: Outcome) -> None:
    """Let a fault end a run that is started or resumed."""
    end = run_job(run.arguments(), fault)
    assert end.struck == [fault.moment.name], f"{fault}: did not happen\n{end.said}"
    assert end.code != 0, f"{fault}: exit code 0\n{end.said}"
    if (run.output_dir / "metrics.jsonl").is_file():
        found = lines(run.output_dir)
        assert found == expected.lines[: len(found)], f"{fault}: other metrics\n{end.said}"


def _complete(run: runs.Run, expected: Outcome) -> None:
    """Resume a run and let it come to its end."""
    end = run_job(run.arguments())
    assert end.code == 0, end.said
    assert difference(outcome(run.output_dir), expected) == ""
