"""Whether a checkpoint can be written: space, permission, and one directory for all nodes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from relora_ds.checkpoint.saving.agreement import Agreement
from relora_ds.checkpoint.saving.problem import Problem, size
from relora_ds.errors import CheckpointError
from relora_ds.files.durable import write_file
from relora_ds.parallel.topology import Topology

_NOT_SHARED = "is another directory on this node than on that of rank 0"
_SHARE = "name an output_dir on storage that all nodes share"


def free_bytes(directory: Path) -> int | None:
    """Bytes that this user may still write where a directory is or will be; None if unknown."""
    for path in (directory, *directory.parents):
        if path.is_dir():
            try:
                found = os.statvfs(path)
            except OSError:
                return None
            return found.f_bavail * found.f_frsize
    return None


def fewest(counts: list[int | None]) -> int | None:
    """The smallest known number."""
    return min((count for count in counts if count is not None), default=None)


def check_room(
    directory: Path, needed: int, agreement: Agreement, topology: Topology
) -> int | None:
    """Make sure that every node can write a checkpoint. A collective call.

    Args:
        directory: of checkpoints; it is made.
        needed: bytes of one checkpoint.
        agreement: of all ranks.
        topology: one rank of each node looks.

    Returns:
        Bytes that are free on the node that sees the fewest; None if none could tell.

    Raises:
        CheckpointError: on every rank: a node cannot write there, sees another directory than the
            first rank, or has less space than `needed`.
    """
    probe = directory / f".probe_{topology.rank}"
    looks = topology.local_rank == 0
    problem = _write_probe(probe, topology.rank) if looks else None
    found = agreement.gather((problem, free_bytes(directory) if looks else None))
    problems = [p for p, _ in found if p is not None]
    if not problems:
        sees = not looks or (directory / ".probe_0").is_file()
        blind = [rank for rank, seen in enumerate(agreement.gather(sees)) if not seen]
        problems = [Problem(rank, f"{directory}: {_NOT_SHARED}", _SHARE) for rank in blind]
    if looks:
        with contextlib.suppress(OSError):  # what keeps it there is among the problems
            probe.unlink(missing_ok=True)
    if problems:
        first = problems[0]
        raise CheckpointError(
            f"checkpoints cannot be saved: rank {first.rank}: {first.what}; {first.remedy}"
        )
    free = fewest([count for _, count in found])
    if free is not None and free < needed:
        raise CheckpointError(
            f"{directory}: {size(free)} are free, but a checkpoint takes about {size(needed)}: "
            f"free {size(needed - free)} or name another output_dir"
        )
    return free


def _write_probe(path: Path, rank: int) -> Problem | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: file.write(b"probe"))
    except OSError as error:
        return Problem.of(error, rank)
    return None
