"""Ranks of the harness are fresh for every case, whatever the cases before them did."""

from __future__ import annotations

import time

import pytest
import torch

from tests.distributed.cases import ranks as cases
from tests.harness.ranks import run_ranks
from tests.harness.run import run

pytestmark = pytest.mark.distributed


def test_a_case_says_the_same_again_after_others_with_other_groups() -> None:
    found = [
        run_ranks(cases.losses, 2, stage=stage, tensor=tensor)
        for stage, tensor in ((3, 1), (2, 2), (3, 1), (2, 2))
    ]
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_case_after_one_that_failed_finds_nothing_of_it() -> None:
    before = run_ranks(cases.surroundings, 2)
    started = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 has had enough"):
        run_ranks(cases.leave_a_mess, 2)
    assert time.monotonic() - started < 60, "the others wait for rank 1 in a barrier"
    assert run_ranks(cases.surroundings, 2) == before
    assert before[0] == torch.float32
    assert before[2:] == ("", False, 2)


def test_a_case_over_its_time_is_killed() -> None:
    with pytest.raises(AssertionError, match="None: killed"):
        run_ranks(cases.hang, 2, 2.0)
    assert run_ranks(cases.surroundings, 1)[-1] == 1


def test_a_script_has_its_exit_code_and_its_output() -> None:
    code, output = run(["--help"])
    assert code == 0
    assert "Pre-train a LLaMA" in output
    code, output = run(["no/such/run.yaml"], processes=2)
    assert code == 2
    assert output.count("no/such/run.yaml") == 1


def test_waiting_for_work_on_a_host_has_not_the_limit_of_a_collective() -> None:
    found = run_ranks(cases.slow_host_work, 2, timeout_minutes=0.02, work_s=2.5)
    assert found["everywhere"] == [(0, "done"), (1, "done")]
    assert found["asked"] == [True, True, False]
    assert found["bounded"] == [False, True]


def test_ranks_that_have_filled_their_model_wait_for_the_others_on_the_host() -> None:
    found = run_ranks(cases.late_builder, 2)
    last = max(filled for filled, _ in found)
    assert all(met >= last for _, met in found)
