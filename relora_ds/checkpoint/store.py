"""Saving and finding checkpoints: complete or absent, never half.

A checkpoint is written to `step_N.tmp`, described by a manifest, renamed to `step_N`, and only then
named in `latest`. `format.layout` says which files it consists of.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.checkpoint.format.record import RunRecord, write_record
from relora_ds.checkpoint.format.tensors import write_tensors
from relora_ds.checkpoint.restore import side_slices, side_tensors
from relora_ds.engine.distributed import barrier
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology


class CheckpointStore:
    """The `checkpoints` directory of a run.

    Args:
        directory: created when the first checkpoint is saved.
        keep: checkpoints to keep, None for all.
        topology: which process this is: the first one writes what exists once.
    """

    def __init__(self, directory: Path, keep: int | None, topology: Topology) -> None:
        self.directory = directory
        self.keep = keep
        self._topology = topology

    def save(
        self,
        engine: TrainEngine,
        record: RunRecord,
        method_tensors: Mapping[str, torch.Tensor],
        tokenizer: Path | None,
    ) -> Path:
        """Write a checkpoint of a state and name it in `latest`. A collective call.

        Args:
            engine: holds weights and optimizer state after `record.trainer.step` updates.
            record: what the checkpoint says of itself.
            method_tensors: of the method's state, as this tensor-parallel rank holds them; may be
                live.
            tokenizer: copied into the checkpoint.

        Returns:
            The checkpoint's directory.
        """
        final = self.directory / layout.checkpoint(record.trainer.step)
        staging = layout.staging(final)
        if self._topology.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in layout.leftovers(self.directory):  # never named, so nobody reads them
                shutil.rmtree(path)
        barrier()
        engine.save(str(self.directory), staging.name)
        self._write_tensors(engine, method_tensors, staging)
        barrier()  # the manifest lists all of them
        if self._topology.is_main:
            for name in layout.SCRIPTS:
                (self.directory / name).unlink(missing_ok=True)
            write_record(record, staging)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, staging / layout.TOKENIZER)
            write_manifest(staging)
            self._publish(staging, final)
        barrier()
        return final

    def _write_tensors(
        self, engine: TrainEngine, method_tensors: Mapping[str, torch.Tensor], staging: Path
    ) -> None:
        """Write what DeepSpeed does not, as far as this process is the one that does."""
        topology = self._topology
        slices = side_slices(engine)
        if slices:
            write_tensors(slices, staging / layout.side_of_rank(topology.rank))
        if topology.dp_rank == 0:
            write_tensors(side_tensors(engine), staging / layout.side(topology.tp.suffix))
            if method_tensors:
                write_tensors(method_tensors, staging / layout.method(topology.tp.suffix))

    def _publish(self, staging: Path, final: Path) -> None:
        stale = layout.stale(final)
        if final.exists():  # the same step again, after resuming from an earlier one
            final.rename(stale)
        staging.rename(final)
        latest = self.directory / layout.LATEST
        pointer = layout.staging(latest)
        pointer.write_text(final.name)
        os.replace(pointer, latest)
        shutil.rmtree(stale, ignore_errors=True)
        if self.keep is not None:
            older = [path for path in list_checkpoints(self.directory) if path != final]
            for path in older[: max(0, len(older) + 1 - self.keep)]:
                shutil.rmtree(path)


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below `directory`, oldest first."""
    steps = {path: layout.step_of(path.name) for path in directory.glob("*")}
    found = {path: step for path, step in steps.items() if step is not None}
    return sorted(found, key=found.__getitem__)


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` names; None if there is none yet.

    Raises:
        CheckpointError: `latest` names something that is not a checkpoint beside it.
    """
    pointer = directory / layout.LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    path = directory / name
    if layout.step_of(name) is None or not path.is_dir():
        complete = [p.name for p in list_checkpoints(directory)]
        remedy = f"resume from {complete[-1]}" if complete else "no complete checkpoint is left"
        raise CheckpointError(
            f"{pointer}: names {name!r}, which is not a checkpoint in that directory; {remedy}"
        )
    return path


def find_checkpoint(path: Path) -> Path:
    """A checkpoint given as `step_N`, as the directory that holds `latest`, or as a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if (path / layout.TRAINER).is_file():
        return path
    for directory in (path, path / layout.CHECKPOINTS):
        found = latest_checkpoint(directory)
        if found is not None:
            return found
    raise CheckpointError(
        f"{path}: no checkpoint here; give a directory step_N, or the one that holds 'latest'"
    )
