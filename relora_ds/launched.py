"""What a launcher tells a process in its environment: which one of how many it is, and where they
meet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from relora_ds.errors import ConfigError

_REMEDY = (
    "launchers set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT together: start with deepspeed, "
    "torchrun or the scripts in launch/, or unset them to use one process"
)
_LARGEST = 2**31 - 1


class LaunchError(ConfigError):
    """What a launcher says of this process cannot be true; of another one it may be."""


@dataclass(frozen=True)
class Launched:
    """A process among those of a launch."""

    rank: int
    world_size: int
    local_rank: int
    """Among those of this node."""


def read_launch(environ: Mapping[str, str]) -> Launched:
    """The place that a launcher gave to this process; that of the only one where there was none.

    Raises:
        LaunchError: a variable is no such number; names all that are wrong.
    """
    processes = _number(environ.get("WORLD_SIZE", "1"), 1)
    limits = {"RANK": (0, (processes or _LARGEST) - 1), "LOCAL_RANK": (0, _LARGEST)}
    problems = [] if processes else [_wrong(environ, "WORLD_SIZE", "of 1 or more")]
    found: list[int] = []
    for name, (least, most) in limits.items():
        value = _number(environ.get(name, "0"), least, most)
        if value is None:
            beyond = f"below WORLD_SIZE ({processes})" if most < _LARGEST - 1 else "of 0 or more"
            problems.append(_wrong(environ, name, beyond))
        found.append(value or 0)
    if problems:
        raise LaunchError(problems)
    assert processes is not None
    return Launched(found[0], processes, found[1])


def check_meeting_place(environ: Mapping[str, str]) -> None:
    """Make sure that a process that was launched knows where the others meet.

    Raises:
        LaunchError: it does not; names all that is missing or wrong.
    """
    problems = list(_problems_of_meeting(environ))
    if problems:
        raise LaunchError(problems)


def rank_or_first(environ: Mapping[str, str]) -> int:
    """The rank of this process, to speak of it; 0 where nothing says it, or what is none."""
    return _number(environ.get("RANK", "0"), 0) or 0


def _problems_of_meeting(environ: Mapping[str, str]) -> Iterator[str]:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            yield f"RANK is {environ.get('RANK')}, but {name} is missing: {_REMEDY}"
    port = environ.get("MASTER_PORT")
    if port and not _number(port, 1, 2**16 - 1):
        yield _wrong(environ, "MASTER_PORT", "from 1 to 65535")


def _number(text: str, least: int, most: int = _LARGEST) -> int | None:
    """A whole number within limits; None for anything else."""
    value = int(text) if re.fullmatch(r"\s*[0-9]{1,10}\s*", text) else -1
    return value if least <= value <= most else None


def _wrong(environ: Mapping[str, str], name: str, rule: str) -> str:
    return f"{name} is {environ.get(name)!r}, but must be a whole number {rule}: {_REMEDY}"
