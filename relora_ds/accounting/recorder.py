"""One recorder of every collective that this process takes part in.

It hooks the methods of torch's `ProcessGroup`, where DeepSpeed's backend object, our own calls of
`torch.distributed` and Megatron's all arrive. Patching any higher misses calls or counts them
twice: DeepSpeed and Megatron keep function objects that they looked up when they were imported,
and DeepSpeed's backend calls torch underneath. A collective is counted where it is issued, by its
tensors' shapes alone: nothing is read from a device, and nothing waits.

Not seen, because it passes by `ProcessGroup`'s Python methods: functional collectives and DTensor,
torch's own DDP reducer, and DeepSpeed's shared-memory and SDMA kernels, none of which are used here
(`join_process_group` switches the shared-memory kernel off).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from relora_ds.accounting.collectives import CALLS, Call, payload_of, wire_bytes

STEP_PHASES = frozenset({"forward", "backward", "step", "event", "control"})
"""Parts of a training step. `event` is a merge, switch or refresh; `control` whatever else the
step does, such as agreeing on a stop or averaging the loss, and is what no phase was named for."""
OTHER_PHASES = frozenset({"setup", "eval", "checkpoint"})
"""What surrounds the steps; never part of a step's figures."""


class Traffic(NamedTuple):
    """What calls are counted by."""

    operation: str
    group: str
    """`world` for every group of all processes, a name given by `name_group`, or torch's name."""
    size: int
    """Ranks in the group."""
    dtype: str
    """Type of the (first) tensor; `none` where nothing is moved."""
    phase: str


@dataclass
class Volume:
    """Calls of one kind and their payload; `collectives` says what payload is."""

    calls: int = 0
    payload: int = 0


Volumes = dict[Traffic, Volume]


class StepBytes(NamedTuple):
    """A step's bytes of all collectives that this rank took part in, scalars included."""

    payload: int
    wire: float


class CommunicationRecorder:
    """Counts this process's collectives while it is started.

    Hooks belong to the process, so only one recorder can be started at a time; the program uses
    the module's `recorder`. Counts are shared by all threads, because autograd issues collectives
    from its own: the phase is the process's, not the thread's, and `backward` returns only when
    those threads are done.
    """

    _started: CommunicationRecorder | None = None

    def __init__(self) -> None:
        self._originals: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._phase = "control"
        self._lock = threading.Lock()
        self._earlier: Volumes = {}
        self._step: Volumes = {}

    @property
    def active(self) -> bool:
        """Whether it is counting."""
        return CommunicationRecorder._started is self

    def start(self) -> None:
        """Begin to count, on top of what was counted before. Again does nothing.

        Raises:
            RuntimeError: another recorder is counting.
        """
        if self.active:
            return
        if CommunicationRecorder._started is not None:
            raise RuntimeError("another recorder counts this process's collectives: stop it first")
        for name, call in CALLS.items():
            if name in vars(ProcessGroup):  # newer names are missing in older torch
                # what the class holds, not what it hands out: that would not bind to an instance
                self._originals[name] = vars(ProcessGroup)[name]
                setattr(ProcessGroup, name, self._counted(getattr(ProcessGroup, name), call))
        CommunicationRecorder._started = self

    def stop(self) -> None:
        """Put the original methods back; what was counted stays. Again does nothing."""
        if not self.active:
            return
        for name, original in self._originals.items():
            setattr(ProcessGroup, name, original)
        self._originals = {}
        CommunicationRecorder._started = None

    def __enter__(self) -> CommunicationRecorder:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def phase(self, name: str) -> _Phase:
        """Context manager: collectives inside belong to this phase; an inner one takes over.

        Raises:
            ValueError: the name is none of `STEP_PHASES` and `OTHER_PHASES`.
        """
        if name not in STEP_PHASES and name not in OTHER_PHASES:
            known = ", ".join(sorted(STEP_PHASES | OTHER_PHASES))
            raise ValueError(f"unknown phase {name!r}: it must be one of {known}")
        return _Phase(self, name)

    def name_group(self, group: ProcessGroup, name: str) -> None:
        """Count this group's collectives under `name`, such as `dp` or `tp`."""
        self._names[group.group_name] = name

    def begin_step(self) -> None:
        """The collectives from here on belong to the next step."""
        with self._lock:
            _add(self._earlier, self._step)
            self._step = {}

    def step_bytes(self) -> StepBytes:
        """Totals since `begin_step`, without what only surrounds the step."""
        return total(v for v in self.step_volumes().items() if v[0].phase in STEP_PHASES)

    def step_volumes(self) -> Volumes:
        """Everything since `begin_step`, also what surrounds the step."""
        return self._sum(self._step)

    def volumes(self) -> Volumes:
        """Everything since the recorder was made or `reset`."""
        return self._sum(self._earlier, self._step)

    def reset(self) -> None:
        """Forget all counts; names of groups stay."""
        with self._lock:
            self._earlier, self._step = {}, {}

    def _sum(self, *parts: Volumes) -> Volumes:
        summed: Volumes = {}
        with self._lock:
            for part in parts:
                _add(summed, part)
        return summed

    def _counted(self, original: Callable[..., Any], call: Call) -> Callable[..., Any]:
        @functools.wraps(original)
        def counted(group: ProcessGroup, /, *args: Any, **kwargs: Any) -> Any:
            self._record(call, group, args, kwargs)
            return original(group, *args, **kwargs)

        return counted

    def _record(
        self, call: Call, group: ProcessGroup, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        size = group.size()
        dtype, payload = payload_of(call, size, args, kwargs)
        kind = Traffic(call.operation, self._name(group, size), size, dtype, self._phase)
        with self._lock:
            volume = self._step.get(kind)
            if volume is None:
                volume = self._step[kind] = Volume()
            volume.calls += 1
            volume.payload += payload

    def _name(self, group: ProcessGroup, size: int) -> str:
        name = self._names.get(group.group_name)
        if name is not None:
            return name
        # DeepSpeed clones the world: those groups move the same bytes between the same ranks
        return "world" if size == torch.distributed.get_world_size() else group.group_name


class _Phase:
    """A class, not a generator: it is entered several times a micro-batch."""

    __slots__ = ("_name", "_outer", "_recorder")

    def __init__(self, owner: CommunicationRecorder, name: str) -> None:
        self._recorder, self._name, self._outer = owner, name, ""

    def __enter__(self) -> None:
        self._outer, self._recorder._phase = self._recorder._phase, self._name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._recorder._phase = self._outer


def total(volumes: Iterable[tuple[Traffic, Volume]]) -> StepBytes:
    """Payload and wire bytes of counted collectives."""
    payload, wire = 0, 0.0
    for kind, volume in volumes:
        payload += volume.payload
        wire += wire_bytes(kind.operation, volume.payload, kind.size)
    return StepBytes(payload, wire)


def counting_seconds(group: ProcessGroup, calls: int = 5000) -> float:
    """What counting adds to one collective: the mean over `calls` that communicate nothing."""
    own = CommunicationRecorder()

    def nothing(group: ProcessGroup, /, *args: Any, **kwargs: Any) -> None:
        return None

    tensors = [torch.zeros(1)]
    seconds = []
    for call in (own._counted(nothing, CALLS["allreduce"]), nothing):
        started = time.perf_counter()
        for _ in range(calls):
            call(group, tensors)
        seconds.append(time.perf_counter() - started)
    return max(0.0, seconds[0] - seconds[1]) / calls


def _add(into: Volumes, part: Volumes) -> None:
    for kind, volume in part.items():
        target = into.setdefault(kind, Volume())
        target.calls += volume.calls
        target.payload += volume.payload


recorder = CommunicationRecorder()
"""The process's recorder; off until it is started."""
