"""Faults that strike a process at a moment of a run which a test names.

The product knows nothing of this: functions are wrapped from outside, files are watched through
Python's audit events, and activities through `relora_ds.activity`. A test writes faults into a
folder (`plan`), the ranks of a run start `tests/faults/armed.py`, which arms them (`arm`), and
`struck` says afterwards which of them did.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from tests.harness.victims import Family

FOLDER = "FAULTS"
"""Environment variable that names the folder of the planned faults."""

When = Literal["before", "after"]


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Args:
        function: as "package.module:name" or "package.module:Class.method".
        when: before the call, or after it returned.
    """

    function: str
    when: When = "before"


@dataclass(frozen=True)
class Doing:
    """A block that the product names by `activity.doing`.

    Args:
        what: the name.
        when: as it is entered, or once it was left without an error.
    """

    what: str
    when: When = "before"


@dataclass(frozen=True)
class File:
    """The moment before Python opens, renames or removes a file.

    Args:
        event: name of the audit event: "open", "os.rename", "os.remove", "os.mkdir" or
            "shutil.rmtree".
        path: regular expression that is searched in the file's path; of a rename, in the new one.
    """

    event: str
    path: str


@dataclass(frozen=True)
class Moment:
    """A moment of a run.

    Args:
        name: unique, in a few words.
        place: what happens there.
        nth: how often it has happened since the update began (in all, if the fault says no step).
    """

    name: str
    place: Call | Doing | File
    nth: int = 1


@dataclass
class Seen:
    """What is known where a fault strikes.

    Args:
        family: the processes that it may kill.
        arguments: of the function, or of the audit event.
        result: what the function returned; None before the call.
    """

    family: Family
    arguments: tuple[Any, ...] = ()
    result: Any = None


class Action(Protocol):
    """What a fault does to the process that it strikes."""

    def __call__(self, seen: Seen) -> None: ...


@dataclass(frozen=True)
class Kill:
    """SIGKILL.

    Args:
        victim: "rank" is the process itself; "job" all processes of its group, its launcher among
            them; "launcher" an ancestor alone. All of them belong to the job's own session.
        ancestor: which one, 1 for the parent.
    """

    victim: Literal["rank", "job", "launcher"] = "rank"
    ancestor: int = 1

    def __call__(self, seen: Seen) -> None:
        if self.victim == "job":
            seen.family.kill_all()
        elif self.victim == "launcher":
            seen.family.kill_launcher(self.ancestor)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Signal:
    """A signal to the process itself."""

    number: int

    def __call__(self, seen: Seen) -> None:
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class Fail:
    """The operating system refuses what is about to be done."""

    number: int

    def __call__(self, seen: Seen) -> None:
        path = next((a for a in seen.arguments if isinstance(a, str | Path)), None)
        raise OSError(self.number, os.strerror(self.number), None if path is None else str(path))


@dataclass(frozen=True)
class Raise:
    """An error of the program."""

    text: str

    def __call__(self, seen: Seen) -> None:
        raise RuntimeError(self.text)


@dataclass(frozen=True)
class Sleep:
    """The process is busy elsewhere."""

    seconds: float

    def __call__(self, seen: Seen) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Scale:
    """The tensor that the function returned is multiplied, as with `nan` or 1e6."""

    factor: float

    def __call__(self, seen: Seen) -> None:
        with torch.no_grad():
            seen.result.mul_(self.factor)


@dataclass(frozen=True)
class Fault:
    """An action at a moment, on one rank.

    Args:
        step: the update that is under way there, counted from 1; None for the first time at all.
        again: whether it strikes every time from then on, and not once.
    """

    moment: Moment
    action: Action = field(default_factory=Kill)
    rank: int = 0
    step: int | None = None
    again: bool = False

    def __str__(self) -> str:
        at = "" if self.step is None else f" of step {self.step}"
        return f"{self.action} on rank {self.rank}: {self.moment.name}{at}"


def plan(folder: Path, faults: Sequence[Fault]) -> dict[str, str]:
    """Write faults down for the ranks of a run, which are started in a session of their own.

    Returns:
        What their environment needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.pickle").write_bytes(pickle.dumps((list(faults), os.getsid(0))))
    (folder / "struck.jsonl").write_bytes(b"")
    return {FOLDER: str(folder)}


def struck(folder: Path) -> list[str]:
    """Names of the moments at which faults struck, in order."""
    return [json.loads(line)["name"] for line in (folder / "struck.jsonl").open()]


def arm() -> None:
    """Prepare this process for the faults that its environment names, if they are for its rank."""
    folder = Path(os.environ[FOLDER])
    faults: list[Fault]
    starter: int
    faults, starter = pickle.loads((folder / "faults.pickle").read_bytes())
    own = [fault for fault in faults if fault.rank == int(os.environ.get("RANK", "0"))]
    if own:
        family = Family.of_this_process(starter)
        _Injector(own, folder / "struck.jsonl", family).install()


class _Injector:
    """Counts what happens in this process, and strikes."""

    def __init__(self, faults: Sequence[Fault], record: Path, family: Family) -> None:
        self._faults, self._record, self._family = faults, record, family
        self._counts = [0] * len(faults)
        self._step: int | None = None
        self._striking = False

    def install(self) -> None:
        self._watch_steps()
        by_function: dict[str, list[int]] = {}
        for number, fault in enumerate(self._faults):
            if isinstance(fault.moment.place, Call):
                by_function.setdefault(fault.moment.place.function, []).append(number)
        for function, numbers in by_function.items():
            self._wrap_function(function, numbers)
        if any(isinstance(fault.moment.place, Doing) for fault in self._faults):
            self._watch_activities()
        if any(isinstance(fault.moment.place, File) for fault in self._faults):
            sys.addaudithook(self._on_event)

    def _watch_steps(self) -> None:
        from relora_ds import activity

        original = activity.at_step

        @functools.wraps(original)
        def at_step(step: int | None) -> None:
            self._step = step
            self._counts = [
                0 if fault.step is not None else count
                for fault, count in zip(self._faults, self._counts, strict=True)
            ]
            original(step)

        _replace(activity, "at_step", at_step)

    def _wrap_function(self, function: str, numbers: Sequence[int]) -> None:
        module_name, _, path = function.partition(":")
        owner: Any = importlib.import_module(module_name)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            given = (*arguments, *named.values())
            self._happens(numbers, "before", Seen(self._family, given))
            result = original(*arguments, **named)
            self._happens(numbers, "after", Seen(self._family, given, result))
            return result

        _replace(owner, name, wrapped)

    def _watch_activities(self) -> None:
        from relora_ds import activity

        original = activity.doing

        @contextmanager
        def doing(what: str) -> Iterator[None]:
            numbers = [n for n, fault in enumerate(self._faults) if _is_doing(fault, what)]
            with original(what):
                self._happens(numbers, "before", Seen(self._family))
                yield
                self._happens(numbers, "after", Seen(self._family))

        _replace(activity, "doing", doing)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._striking:
            return
        for number, fault in enumerate(self._faults):
            place = fault.moment.place
            if isinstance(place, File) and place.event == event:
                path = arguments[1 if event == "os.rename" else 0]
                if not _only_reads(event, arguments) and _matches(place.path, path):
                    self._happens([number], "before", Seen(self._family, arguments))

    def _happens(self, numbers: Sequence[int], when: When, seen: Seen) -> None:
        for number in numbers:
            fault, place = self._faults[number], self._faults[number].moment.place
            if getattr(place, "when", "before") != when or fault.step not in (None, self._step):
                continue
            self._counts[number] += 1
            count, nth = self._counts[number], fault.moment.nth
            if count == nth or (fault.again and count > nth):
                self._strike(fault, seen)

    def _strike(self, fault: Fault, seen: Seen) -> None:
        self._striking = True
        line = {"name": fault.moment.name, "rank": fault.rank, "step": self._step}
        with self._record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        try:
            fault.action(seen)
        finally:
            self._striking = False


def _is_doing(fault: Fault, what: str) -> bool:
    place = fault.moment.place
    return isinstance(place, Doing) and place.what == what


def _only_reads(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def _matches(pattern: str, path: object) -> bool:
    return isinstance(path, str | os.PathLike) and bool(re.search(pattern, str(path)))


def _replace(owner: Any, name: str, new: Callable[..., Any]) -> None:
    """Put a function in place of another one, also where the product imported it by name."""
    original = getattr(owner, name)
    setattr(owner, name, new)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("relora_ds") and vars(module).get(name) is original:
            setattr(module, name, new)
