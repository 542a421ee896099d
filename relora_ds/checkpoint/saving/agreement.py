"""What all ranks know of each other's part of a save.

Ranks talk over a group of their own on the host, from their main threads only: nothing waits for
work queued on a device, and no collective of training is overtaken. A rank that writes for an hour
still answers at once, since the writing is done by another thread; one that does not answer is lost
like in any other collective.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")
_UNKNOWN = -(1 << 62)


class Agreement:
    """The ranks of a run, as those who save together. A collective to construct.

    Args:
        world_size: number of ranks; alone, a rank agrees with itself.
    """

    def __init__(self, world_size: int) -> None:
        self._size = world_size
        self._group = torch.distributed.new_group(backend="gloo") if world_size > 1 else None

    def look(self, done: bool, failed: bool) -> tuple[bool, bool]:
        """Whether all ranks are done, and whether any has failed. A collective call."""
        if self._group is None:
            return done, failed
        flags = torch.tensor([int(not done), int(failed)])
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=self._group)
        pending, any_failed = flags.tolist()
        return not pending, bool(any_failed)

    def room(self, size: int, free: int | None) -> tuple[int, int | None]:
        """What all ranks are going to write, and what is free for it. A collective call.

        Args:
            size: bytes that this rank is going to write.
            free: bytes that it sees free; None if it does not know.

        Returns:
            The bytes of all, and the fewest that are free.
        """
        if self._group is None:
            return size, free
        # one reduction: sizes have a place each, and the least is the largest of the negated
        sizes = [0] * self._size
        sizes[torch.distributed.get_rank()] = size
        said = torch.tensor([_UNKNOWN if free is None else -free, *sizes])
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX, group=self._group)
        negated, *sizes = said.tolist()
        return sum(sizes), None if negated == _UNKNOWN else -negated

    def gather(self, value: T) -> list[T]:
        """What every rank says, by rank. A collective call."""
        if self._group is None:
            return [value]
        answers: list[Any] = [None] * self._size
        torch.distributed.all_gather_object(answers, value, group=self._group)
        return answers
