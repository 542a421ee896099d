"""A rank of torchrun knows at its start whether torchrun still exists."""

from __future__ import annotations

import os

import pytest

from relora_ds.train.lifetime import launcher


@pytest.mark.parametrize(
    ("program", "abandoned"),
    [
        pytest.param("some-init", True, id="reaped by the first process"),
        pytest.param("", True, id="reaped by the first process, of another user"),
        pytest.param("python3.11", False, id="torchrun is the first process of a container"),
    ],
)
def test_a_rank_whose_torchrun_died_while_it_started_is_abandoned(
    monkeypatch: pytest.MonkeyPatch, program: str, abandoned: bool
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os, "getpgrp", os.getpid)
    monkeypatch.setattr(launcher, "_program", lambda pid: program)
    assert launcher.Launcher().is_lost_at_start is abandoned
