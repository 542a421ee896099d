"""Candidates in host memory: what is on its way there has arrived before anybody reads it."""

from __future__ import annotations

import pytest
import torch

from relora_ds.methods.switchlora.candidate_pool import CandidatePool
from tests.unit.methods.test_switchlora import Run


class _Queue:
    """A stream that notes when the host waited for it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def synchronize(self) -> None:
        self._log.append(self._name)


def test_vectors_on_their_way_to_the_host_arrive_before_they_are_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    run = Run(candidates="host")
    for step in range(1, 5):
        run.move(step)
        run.switch(step)
    read = CandidatePool.chunks

    def chunks(pool: CandidatePool) -> list[torch.Tensor]:
        log.append("read")
        return read(pool)

    monkeypatch.setattr(CandidatePool, "chunks", chunks)
    monkeypatch.setattr(run.session, "_stream", _Queue("stream of the candidates", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: _Queue("stream of the model", log))
    saved = run.session.state_dict()
    assert any(".vectors." in key for key in saved)
    assert sorted(log[:2]) == ["stream of the candidates", "stream of the model"]
    assert set(log[2:]) == {"read"}
