"""Do all ranks stand at the same place of the same run? Asked once a step and before every event.

A rank that is one step ahead, or whose method is in another state, would enter a collective that
the others do not, and the run would hang or mix up values. All ranks therefore meet in one small
reduction on the host, the same one wherever they are: ranks that come from different places meet
as well, and find out.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

import torch
from torch.distributed import ProcessGroup, Work

from relora_ds.errors import DesyncError
from relora_ds.parallel.islands import ALONE, Islands, join_one_of

_BYTES = 7  # of a digest: it and its complement fit int64


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    point: str
    """What it is about to do, in a word or two."""
    step: int
    """Completed updates of the run."""
    phase: str
    """Method in charge."""
    state: str = ""
    """Digest of the method's own state, where it has one."""

    def __str__(self) -> str:
        state = f", method state {self.state}" if self.state else ""
        return f"{self.point} after {self.step} updates in phase {self.phase}{state}"

    def digest(self) -> int:
        """56 bits of all of it."""
        return int(digest_of(repr(astuple(self)).encode()), 16)


def digest_of(content: bytes) -> str:
    """56 bits of any content, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=_BYTES).hexdigest()


@dataclass(frozen=True)
class _Asked:
    """A meeting that is under way."""

    place: Place
    flags: torch.Tensor
    group: ProcessGroup
    work: Work | None


class Agreement:
    """Meetings of all ranks, in a group of their own on the host: the answer must not wait for work
    that is queued on a device. Made on every rank.

    Within a round of islands each island meets by itself, and a wish to stop waits for its end.

    Args:
        islands: whose ranks can meet among themselves.
        every: updates of a round.
        later: whether islands go on at the end of a round before they know what others want.
    """

    def __init__(self, islands: Islands = ALONE, every: int = 1, later: bool = False) -> None:
        self._every, self._later = every, later
        self._asked: _Asked | None = None
        world = range(torch.distributed.get_world_size())
        self._everyone = join_one_of([world], torch.distributed.get_rank(), backend="gloo")
        self._within = self._everyone
        if islands.local is not None:
            own = tuple(torch.distributed.get_process_group_ranks(islands.local))
            parts: list[tuple[int, ...]] = [()] * len(world)
            torch.distributed.all_gather_object(parts, own, group=self._everyone)
            parts = sorted(set(parts))
            self._within = join_one_of(parts, torch.distributed.get_rank(), backend="gloo")

    def meet(self, place: Place, stop: bool = False) -> bool:
        """Wait for all ranks and make sure that they are at the same place. A collective call.

        Args:
            place: where this rank is.
            stop: whether this rank wants the run to end here.

        Returns:
            Whether any rank wants that.

        Raises:
            DesyncError: on every rank: they are at different places; names them.
        """
        return self._answer(self._ask(place, stop))

    def ask(self, place: Place, stop: bool) -> bool:
        """Meet at the end of an update; whether the run is to end here. A collective call.

        Where islands meet over a slow link and may go on, they do: what they want, and whether they
        are at the same place, is known after the next update.
        """
        earlier, self._asked = self._asked, None
        wanted = earlier is not None and self._answer(earlier)
        if self._later and place.step % self._every == 0:
            self._asked = self._ask(place, stop)
            return wanted
        return self.meet(place, stop) or wanted

    def _ask(self, place: Place, stop: bool) -> _Asked:
        digest, within = place.digest(), place.step % self._every > 0
        # the largest and, inverted, the smallest in one reduction
        flags = torch.tensor([int(stop and not within), digest, ~digest])
        group, largest = self._within if within else self._everyone, torch.distributed.ReduceOp.MAX
        work = torch.distributed.all_reduce(flags, op=largest, group=group, async_op=True)
        return _Asked(place, flags, group, work)

    def _answer(self, asked: _Asked) -> bool:
        if asked.work is not None:
            asked.work.wait()
        wanted, high, low = asked.flags.tolist()
        if high != ~low:
            self._refuse(asked.place, asked.group)
        return bool(wanted)

    def _refuse(self, place: Place, group: ProcessGroup) -> None:
        places: list[str] = ["" for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather_object(places, str(place), group=group)
        ranks: dict[str, list[str]] = {}
        for rank, text in zip(
            torch.distributed.get_process_group_ranks(group), places, strict=True
        ):
            ranks.setdefault(text, []).append(str(rank))
        found = "; ".join(f"rank {', '.join(where)}: {text}" for text, where in ranks.items())
        raise DesyncError(
            f"the ranks are not at the same place of the run ({found}): they read different "
            "checkpoints, run files or code, or one of them is at fault; make these the same on "
            "every node and resume from the last checkpoint"
        )
