"""What all ranks do to watch each other: a thread that beats, looks and believes.

`peers` says who talks to whom.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from relora_ds import activity
from relora_ds.train.lifetime.failure import Failure, How
from relora_ds.train.lifetime.link import Identity, Link

BEAT_S = 1.0
"""How often a rank says that it is there."""
LOOK_S = 0.2
"""How long it listens before it looks around."""
_PAUSE_S = 5.0
"""A round that took longer means that this process was stopped: others are not to blame."""
_LATER_S = 2.0
"""By how much others are slower than rank 0 to believe a silence: it tells all the same."""


@dataclass
class Peer:
    """What is known of another rank.

    Args:
        who: which process it is.
        link: the connection to it.
        heard_at: when it last said something, on this machine's clock.
        activity: what it was doing then.
        stalled_s: for how long it had not moved where it must.
        has_left: whether it said goodbye or that it failed.
        has_seen: whether it knows of the failure.
    """

    who: Identity
    link: Link
    heard_at: float
    activity: str = "start"
    stalled_s: float = 0.0
    has_left: bool = False
    has_seen: bool = False

    def stalled(self, now: float) -> float:
        """For how long it has not moved where it must, as far as is known."""
        return self.stalled_s + now - self.heard_at if self.stalled_s > 0 else 0.0


class Watch(ABC):
    """One rank's part.

    Args:
        rank: this one.
        limit_s: for how long a rank may say nothing, or not move where it must.
        on_loss: called on the thread with a failure that is another rank's, or a lack of progress;
            ends the process.
    """

    def __init__(self, rank: int, limit_s: float, on_loss: Callable[[Failure], None]) -> None:
        self.who = Identity.own(rank)
        self.limit_s = limit_s
        self._on_loss = on_loss
        self._cause: Failure | None = None
        self._is_own = False
        self._known = threading.Event()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Say goodbye: this rank ends in order. Not to be called after a failure."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_PAUSE_S)

    def cause(self, wait_s: float = 0.0) -> Failure | None:
        """The first failure of the run, as far as it is known within a time."""
        self._known.wait(wait_s)
        return self._cause

    @abstractmethod
    def publish(self, failure: Failure, wait_s: float) -> Failure:
        """Tell the others of a failure of this rank.

        Args:
            failure: this rank's.
            wait_s: for how long to wait for an answer.

        Returns:
            The first failure of the run; this one if nobody knows of an earlier one.
        """

    @abstractmethod
    def drain(self, wait_s: float) -> None:
        """Wait until all who can know of the failure do: the end of a process may lose words."""

    @abstractmethod
    def end_silent(self) -> None:
        """Kill those ranks of this machine that cannot end themselves, because they are stopped."""

    @abstractmethod
    def _exchange(self, beat: bool) -> None:
        """Send and receive for a short while."""

    @abstractmethod
    def _peers(self) -> Iterable[Peer]:
        """Those whose silence would be noticed here."""

    @abstractmethod
    def _farewell(self) -> None:
        """Say goodbye and close all connections."""

    def _decide(self, failure: Failure, own: bool = False) -> Failure:
        """Take a failure for the first one, unless there is one already."""
        with self._lock:
            if self._cause is None:
                self._cause, self._is_own = failure, own
                self._known.set()
            return self._cause

    def _run(self) -> None:
        last, beat_at, told = time.monotonic(), 0.0, False
        while not self._closing.is_set():
            now = time.monotonic()
            if now - last > _PAUSE_S:
                activity.moved()
                for peer in self._peers():
                    peer.heard_at += now - last
            last = now
            beat = now - beat_at >= BEAT_S
            beat_at = now if beat else beat_at
            self._exchange(beat)
            if self._cause is None:
                self._judge(time.monotonic())
            if self._cause is not None and not told and not self._is_own:
                told = True  # the ending needs this thread no more, but others may still listen
                ending = threading.Thread(target=self._on_loss, args=(self._cause,), daemon=True)
                ending.start()
        self._farewell()

    def _judge(self, now: float) -> None:
        silent = [peer for peer in self._peers() if now - peer.heard_at > self._patience_s]
        if silent:
            seconds = now - silent[0].heard_at
            text = f"did not answer for {seconds:.0f} s: stopped, frozen, or its host out of reach"
            self._decide(lost("silent", silent, text))

    @property
    def _patience_s(self) -> float:
        return self.limit_s + (_LATER_S if self.who.rank else 0.0)


def gone(peer: Peer) -> Failure:
    """That a rank ended without saying why."""
    text = "ended without a word: killed by a signal (by the system, if memory ran out) or crashed"
    return lost("gone", [peer], text)


def lost(how: How, peers: list[Peer], text: str) -> Failure:
    """That some ranks were lost in one way; `text` goes on from the name of a process."""
    who, ranks = peers[0].who, tuple(sorted(peer.who.rank for peer in peers))
    others = f" (so did ranks {_ranges(list(ranks[1:]))})" if len(ranks) > 1 else ""
    text = f"process {who.pid} on {who.host} {text}{others}"
    return described(who, peers[0].activity, text, how, ranks)


def described(who: Identity, where: str, text: str, how: How, ranks: tuple[int, ...]) -> Failure:
    """What others say of a rank, whose exit code they cannot know."""
    return Failure(who.rank, who.host, who.pid, where, how, text, None, how, ranks=ranks)


def grouped(doing: dict[int, str]) -> str:
    """Ranks by what they do, the few before the many: those are the odd ones."""
    ranks = defaultdict(list)
    for rank, what in sorted(doing.items()):
        ranks[what].append(rank)
    groups = sorted(ranks.items(), key=lambda item: len(item[1]))
    return "; ".join(f"rank {_ranges(found)} in {what!r}" for what, found in groups)


def odd_one(doing: Mapping[int, str], stalled: Mapping[int, float], limit_s: float) -> int:
    """The rank that the others most likely wait for.

    It does what the fewest do: those that wait for it do so in one place. Of several such ranks it
    is the one that has stood still for longest, because the others went on until they needed it.

    Args:
        doing: activity of every rank.
        stalled: seconds since it last went on.
        limit_s: seconds that no rank may stand still for.
    """
    alike = Counter(doing.values())
    still = [rank for rank, seconds in stalled.items() if seconds > limit_s / 2]
    return max(still, key=lambda rank: (-alike[doing[rank]], stalled[rank]))


def _ranges(ranks: list[int]) -> str:
    """Sorted numbers as "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
