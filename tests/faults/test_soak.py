"""SIGKILL at random moments to random victims, over and over: nothing is lost or done twice.

`-m slow` kills every method's run 200 times; `--log-cli-level info` tells how often whom.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import TinyCorpus
from tests.faults import runs
from tests.faults.conftest import Unbroken
from tests.harness.jobs import Job, run_job, start_job
from tests.harness.outcome import difference, outcome

_logger = logging.getLogger(__name__)

pytestmark = pytest.mark.distributed

_SEED = "SOAK_SEED"
"""Environment variable that repeats the choices of an earlier soak; moments differ all the same."""
_LATEST_S = 3.0
"""When a job is killed at the latest, after its start: an undisturbed one takes about as long."""


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        ("relora", 5),
        *(
            pytest.param(method, 200, marks=[pytest.mark.slow, pytest.mark.timeout(5400)])
            for method in runs.METHODS
        ),
    ],
)
def test_random_kills_change_nothing(
    method: str, kills: int, tiny_corpus: TinyCorpus, unbroken: Unbroken, tmp_path: Path
) -> None:
    seed = int(os.environ.get(_SEED, random.SystemRandom().randrange(1 << 30)))
    draw, killed = random.Random(seed), Counter[str]()
    expected, number = unbroken(method), 0
    run = runs.write(method, tiny_corpus, tmp_path / "0")
    while killed.total() < kills:
        job = start_job(run.arguments(), [])
        time.sleep(draw.uniform(0.0, _LATEST_S))
        victim = _strike(job, draw)
        end = job.finish()
        if victim is not None:
            killed[victim] += 1
        if end.code != 0:
            assert victim is not None, f"{_SEED}={seed}: ended by itself\n{end.said}"
            continue
        context = f"{_SEED}={seed}, run {number}, kills so far {dict(killed)}\n{end.said}"
        assert difference(outcome(run.output_dir), expected) == "", context
        number += 1
        run = runs.write(method, tiny_corpus, tmp_path / str(number))
    end = run_job(run.arguments())
    context = f"{_SEED}={seed}, run {number}, kills {dict(killed)}\n{end.said}"
    _logger.info("%s: %s killed, %d runs, %s=%d", method, dict(killed), number + 1, _SEED, seed)
    assert end.code == 0, context
    assert difference(outcome(run.output_dir), expected) == "", context


def _strike(job: Job, draw: random.Random) -> str | None:
    """Kill a part of a job; returns which, None if it was over before."""
    victim = draw.choice(("launcher", "rank 0", "rank 1", "job"))
    alive = job.processes()
    if not alive or alive[0].pid != job.launcher:
        return None
    chosen = {"launcher": alive[:1], "rank 0": alive[1:2], "rank 1": alive[2:3], "job": alive}
    count = 0
    for process in chosen[victim]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            count += 1
    return victim if count else None
