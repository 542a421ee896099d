"""Restoring a verified checkpoint that one rank can no longer read."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from relora_ds.checkpoint import resume
from relora_ds.checkpoint.resume import restore_phase
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed import checkpoint_engine
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology
from tests.distributed.cases.reshape import BREAK_AT, build, save, train
from tests.harness.runs import relora

_FAULTY = 1


def refused(topology: Topology, stage: int, directory: Path) -> dict[str, list[str]]:
    """A run that is saved, and restored several times while one rank's reading fails.

    Returns:
        By what fails, the words of every rank; nothing where the rank restored the run.
    """
    config = relora("zero", "bf16")
    run = build(config, stage, topology)
    train(run, 0, BREAK_AT)
    saved = SavedRun(save(run, stage, directory))
    run.destroy()
    found = {}
    for name, fault in _FAULTS.items():
        run = build(config, stage, topology)
        with fault(run.session) if topology.rank == _FAULTY else _nothing():
            found[name] = distributed.gather_objects(_words(saved, run, topology, stage))
        run.destroy()
    return found


def _words(saved: SavedRun, run: Any, topology: Topology, stage: int) -> str:
    try:
        restore_phase(saved, run.engine, run.session, topology, stage)
    except CheckpointError as error:
        return str(error)
    return ""


@contextmanager
def _nothing(*_: object) -> Iterator[None]:
    yield


def _broken_disk(path: Path) -> Any:
    raise OSError(errno.EIO, "Input/output error", str(path))


def _damaged(path: Path) -> Any:
    raise CheckpointError(f"{path}: cannot be read (bad header); use another checkpoint")


_FAULTS: dict[str, Callable[[Any], Any]] = {
    "nothing": _nothing,
    "shard": lambda _: mock.patch.object(checkpoint_engine, "read_shard", _broken_disk),
    "damaged shard": lambda _: mock.patch.object(checkpoint_engine, "read_shard", _damaged),
    "side": lambda _: mock.patch.object(resume, "read_tensors", _broken_disk),
    "method": lambda session: mock.patch.object(
        session, "load_state_dict", side_effect=EOFError("the stream ended")
    ),
}
"""Ways in which a rank fails between the verdict over the files and the end of the restoring."""
