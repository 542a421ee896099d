"""Ranks that watch each other on a thread of their own: who has failed, is gone, silent or stuck.

Every rank keeps a connection to rank 0. A rank that dies breaks its connection, which is known at
once on any machine. A rank that is stopped or out of reach says nothing any more, and one whose
main thread is stuck says so; both are believed after the limit. Rank 0 decides which failure was
the first and tells all. No device and no collective takes part.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from relora_ds import activity
from relora_ds.train.lifetime.failure import Failure
from relora_ds.train.lifetime.link import Identity, Link, Message, open_server, ready
from relora_ds.train.lifetime.watch import LOOK_S, Peer, Watch, described, gone, grouped, odd_one

_ANSWER_S = 10.0
"""How long a rank that is stuck may take to hear why the run ends; a stopped one never does."""


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens.

    Args:
        port: on its machine.
        token: what a rank of this run knows.
    """

    port: int
    token: str = field(repr=False)


class Hub(Watch):
    """Rank 0's part: hears all, decides and tells.

    Args:
        world_size: number of ranks.
    """

    def __init__(
        self, rank: int, limit_s: float, on_loss: Callable[[Failure], None], world_size: int
    ) -> None:
        super().__init__(rank, limit_s, on_loss)
        self._others: dict[int, Peer] = {}
        self._strangers: dict[Link, None] = {}
        self._selector = selectors.DefaultSelector()
        self._server = open_server() if world_size > 1 else None
        self._told = False
        self.address = Address(0, secrets.token_hex(16))
        if self._server is not None:
            self.address = Address(self._server.getsockname()[1], self.address.token)
            self._selector.register(self._server, selectors.EVENT_READ, None)

    def publish(self, failure: Failure, wait_s: float) -> Failure:
        """Decide at once; the thread tells the others."""
        return self._decide(failure, own=True)

    def drain(self, wait_s: float) -> None:
        """Wait until all who are there have said that they know."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and not (self._told and self._all_know()):
            time.sleep(LOOK_S / 5)

    def _all_know(self) -> bool:
        excused = () if self._cause is None else self._cause.culprits
        return all(_has_heard(p) or r in excused for r, p in list(self._others.items()))

    def end_silent(self) -> None:
        """Kill those of this machine that are stopped: a rank that only waits has heard of it."""
        if self._cause is None or self._cause.how not in ("silent", "stuck"):
            return
        culprits = [self._others[rank] for rank in self._cause.culprits if rank in self._others]
        deadline = time.monotonic() + (_ANSWER_S if self._cause.how == "stuck" else 0.0)
        while time.monotonic() < deadline and not all(map(_has_heard, culprits)):
            time.sleep(LOOK_S / 5)
        for peer in culprits:
            if not _has_heard(peer):
                peer.who.kill()

    def _peers(self) -> Iterable[Peer]:
        return [peer for peer in list(self._others.values()) if not peer.has_left]

    def _exchange(self, beat: bool) -> None:
        for link in ready(self._selector, LOOK_S):
            if link is None:
                self._accept()
            else:
                self._hear(link)
        if self._cause is not None and not self._told:
            self._tell({"kind": "cause", "failure": asdict(self._cause)})
            self._told = True
        elif beat:
            self._tell({"kind": "beat", "activity": activity.current()})

    def _tell(self, message: Message) -> None:
        for peer in list(self._others.values()):
            peer.link.send(message)

    def _accept(self) -> None:
        assert self._server is not None
        link = Link(self._server.accept()[0])
        self._strangers[link] = None
        self._selector.register(link.connection, selectors.EVENT_READ, link)

    def _hear(self, link: Link) -> None:
        for message in link.receive():
            if link in self._strangers:
                self._welcome(link, message)
                continue
            for peer in self._others.values():
                if peer.link is link:
                    self._take(peer, message)
        if not link.is_open:
            self._selector.unregister(link.connection)
            self._strangers.pop(link, None)
            for peer in self._peers():
                if peer.link is link:
                    peer.has_left = True
                    self._decide(gone(peer))
            link.close()

    def _welcome(self, link: Link, message: Message) -> None:
        if message.get("kind") != "hello" or message.get("token") != self.address.token:
            link.close()
            return
        del self._strangers[link]
        who = Identity(**message["who"])
        self._others[who.rank] = Peer(who, link, time.monotonic())
        link.send({"kind": "hello", "who": asdict(self.who)})

    def _take(self, peer: Peer, message: Message) -> None:
        peer.heard_at = time.monotonic()
        kind = message.get("kind")
        if kind == "beat":
            peer.activity, peer.stalled_s = message["activity"], message["stalled_s"]
        elif kind == "failed":
            peer.has_left = True
            first = self._decide(Failure.from_json(message["failure"]))
            peer.link.send({"kind": "cause", "failure": asdict(first)})
        elif kind == "done":
            peer.has_left = True
        elif kind == "seen":
            peer.has_seen = True

    def _judge(self, now: float) -> None:
        super()._judge(now)
        peers = {peer.who.rank: peer for peer in self._peers()}
        stalled = {rank: peer.stalled(now) for rank, peer in peers.items()}
        stalled[self.who.rank] = activity.stalled_s()
        if max(stalled.values()) > self.limit_s:
            doing = {rank: peer.activity for rank, peer in peers.items()}
            doing[self.who.rank] = activity.current()
            first = odd_one(doing, stalled, self.limit_s)
            who = self.who if first == self.who.rank else peers[first].who
            text = f"no progress for {stalled[first]:.0f} s: {grouped(doing)}"
            self._decide(described(who, doing[first], text, "stuck", (first,)))

    def _farewell(self) -> None:
        """The others may end a little later, and must not take this for a loss."""
        self._tell({"kind": "done"})
        for peer in self._others.values():
            peer.link.close()
        if self._server is not None:
            self._server.close()


def _has_heard(peer: Peer) -> bool:
    """Whether a rank knows why the run ends, or has ended."""
    return peer.has_seen or peer.has_left or not peer.link.is_open


class Spoke(Watch):
    """Every other rank's part: reports to rank 0 and believes it.

    Args:
        host: where rank 0 runs.
        address: where it listens there.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(
        self,
        rank: int,
        limit_s: float,
        on_loss: Callable[[Failure], None],
        host: str,
        address: Address,
    ) -> None:
        super().__init__(rank, limit_s, on_loss)
        connection = socket.create_connection((host, address.port), timeout=limit_s)
        self._link = Link(connection)
        self._last_words = ""
        first = Identity(0, host, 0, "", "")
        self._first = Peer(first, self._link, time.monotonic())
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ, self._link)
        self._link.send({"kind": "hello", "token": address.token, "who": asdict(self.who)})

    def publish(self, failure: Failure, wait_s: float) -> Failure:
        """Tell rank 0, and wait for what it says was first."""
        self._is_own = True
        self._link.send({"kind": "failed", "failure": asdict(failure)})
        return self.cause(wait_s) or self._decide(failure, own=True)

    def drain(self, wait_s: float) -> None:
        """Nothing to wait for: rank 0 has answered."""

    def end_silent(self) -> None:
        """Kill rank 0 if it is the one."""
        if self._cause is not None and self._cause.how == "silent" and 0 in self._cause.culprits:
            self._first.who.kill()

    def _peers(self) -> Iterable[Peer]:
        return [] if self._first.has_left else [self._first]

    def _exchange(self, beat: bool) -> None:
        now = activity.current()
        if beat or now != self._last_words:
            self._last_words = now
            words = {"activity": now, "stalled_s": activity.stalled_s()}
            self._link.send({"kind": "beat", **words})
        for message in self._link.receive() if ready(self._selector, LOOK_S) else []:
            self._first.heard_at = time.monotonic()
            if message.get("kind") == "cause":
                self._decide(Failure.from_json(message["failure"]), own=self._is_own)
                self._link.send({"kind": "seen"})
            elif message.get("kind") == "done":
                self._first.has_left = True
            elif message.get("kind") == "beat":
                self._first.activity = message["activity"]
            elif message.get("kind") == "hello":
                self._first.who = Identity(**message["who"])
        if not self._link.is_open:
            if not self._first.has_left:
                self._first.has_left = True
                self._decide(gone(self._first), own=self._is_own)
            time.sleep(LOOK_S)  # nothing will come any more

    def _farewell(self) -> None:
        self._link.send({"kind": "done"})
        self._link.close()
