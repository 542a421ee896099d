"""What ranks tell each other of a save, with threads in place of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

from relora_ds.checkpoint.saving.agreement import Agreement

T = TypeVar("T")
RANKS = 3


class Group:
    """Collectives among threads: the two that an agreement uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=30)
        self._said: list[Any] = [None] * RANKS
        self._own = threading.local()
        self.meetings = 0
        monkeypatch.setattr(torch.distributed, "new_group", lambda backend: self)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: self._own.rank)
        monkeypatch.setattr(torch.distributed, "all_reduce", self._all_reduce)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self._all_gather_object)

    def ask(self, question: Callable[[Agreement, int], T]) -> list[T]:
        """Every rank's answer to what it asks of its agreement."""

        def run(rank: int) -> T:
            self._own.rank = rank
            try:
                return question(Agreement(RANKS), rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(run, range(RANKS)))

    def _exchange(self, value: Any) -> list[Any]:
        self._said[self._own.rank] = value
        if self._barrier.wait() == 0:
            self.meetings += 1
        said = list(self._said)
        self._barrier.wait()  # nobody speaks again before all have heard
        return said

    def _all_reduce(self, tensor: torch.Tensor, op: Any, group: Group) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        tensor.copy_(torch.stack(self._exchange(tensor.clone())).amax(dim=0))

    def _all_gather_object(self, answers: list[Any], value: Any, group: Group) -> None:
        answers[:] = self._exchange(value)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(monkeypatch)


def test_alone_a_rank_agrees_with_itself() -> None:
    alone = Agreement(1)
    assert alone.look(done=True, failed=False) == (True, False)
    assert alone.room(size=5, free=None) == (5, None)
    assert alone.gather("word") == ["word"]


@pytest.mark.parametrize(
    ("done", "failed", "agreed"),
    [
        ((True, True, True), (False, False, False), (True, False)),
        ((True, True, False), (False, False, False), (False, False)),
        ((True, False, False), (False, True, False), (False, True)),
        ((True, True, True), (False, False, True), (True, True)),
    ],
)
def test_all_are_done_and_any_has_failed(
    group: Group, done: list[bool], failed: list[bool], agreed: tuple[bool, bool]
) -> None:
    assert group.ask(lambda own, rank: own.look(done[rank], failed[rank])) == [agreed] * RANKS


@pytest.mark.parametrize(
    ("free", "least"),
    [
        ((7 << 50, 3 << 50, 5 << 50), 3 << 50),
        ((7, 0, 5), 0),
        ((None, 3, None), 3),
        ((None, None, None), None),
    ],
)
def test_one_meeting_tells_of_the_room(
    group: Group, free: tuple[int | None, ...], least: int | None
) -> None:
    sizes = (1 << 45, 0, 3)
    answers = group.ask(lambda own, rank: own.room(sizes[rank], free[rank]))
    assert answers == [(sum(sizes), least)] * RANKS
    assert group.meetings == 1


def test_what_every_rank_says_is_in_their_order(group: Group) -> None:
    answers = group.ask(lambda own, rank: own.gather(f"rank {rank}" if rank else None))
    assert answers == [[None, "rank 1", "rank 2"]] * RANKS
