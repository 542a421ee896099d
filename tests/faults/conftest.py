"""Unbroken runs, which broken ones are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.conftest import TinyCorpus
from tests.faults import runs
from tests.harness.jobs import run_job
from tests.harness.outcome import Outcome, outcome

Unbroken = Callable[[str], Outcome]


@pytest.fixture(scope="session")
def unbroken(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """What the run of a method leaves behind that nothing happens to, trained when asked for."""

    @functools.cache
    def train(method: str) -> Outcome:
        run = runs.write(method, tiny_corpus, tmp_path_factory.mktemp("unbroken") / method)
        end = run_job(run.arguments())
        assert end.code == 0, end.said
        return outcome(run.output_dir)

    return train
