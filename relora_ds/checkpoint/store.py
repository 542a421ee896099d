"""Saving and finding checkpoints: complete or absent, never half.

A checkpoint is written to `step_N.tmp`, described by a manifest, renamed to `step_N`, and only then
named in `latest`. Layout of `checkpoints/`:

    latest                          name of the newest complete checkpoint
    step_N/mp_rank_00_model_states.pt, zero_pp_rank_*_optim_states.pt    DeepSpeed's shards, one
                                    set per tensor-parallel rank mp_rank_NN
    step_N/state-*.safetensors      instead of them: every parameter by name, of no topology
    step_N/side.safetensors         base-weight residuals and vector clocks
    step_N/side_rank_R.safetensors  residuals of rank R's slices, where weights are cut over ranks
    step_N/trainer.json             step, phase, tokens, topology, method state
    step_N/method.safetensors       tensors of the method's state, if it has any
    step_N/run.yaml, model.json     the resolved run and its architecture
    step_N/tokenizer.model          if the run has one
    step_N/manifest.json            size and SHA-256 of all of these

Under tensor parallelism side and method files end in _tp_R, one per rank of a copy of the model.

Nothing in a run draws from a global random generator, so there is no generator state to keep: the
seed and the step are the state, and they also fix the position in the data.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from relora_ds.checkpoint.manifest import verify_manifest, write_manifest
from relora_ds.checkpoint.method_state import Likeness
from relora_ds.checkpoint.restore import load_side_tensors, load_state, side_slices, side_tensors
from relora_ds.checkpoint.saved_state import SavedState
from relora_ds.config.load import dump_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine.distributed import barrier, broadcast_object, rank
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology

LATEST = "latest"
METHOD_FILE = "method{}.safetensors"
_SIDE = "side{}.safetensors"
_SLICES = "side_rank_{}.safetensors"
COPIED = ("run.yaml", "model.json", "tokenizer.model")
"""Files that do not depend on how the state is cut."""
_NAME = re.compile(r"step_(\d+)")
# DeepSpeed drops conversion scripts beside the shards; at stage 1 they silently omit the frozen
# weights, and nobody should run code out of a checkpoint: `tools/export_hf.py` converts.
_UNWANTED = ("zero_to_fp32.py", "zero_to_torch.py")


@dataclass(frozen=True)
class TrainerState:
    """What is needed to go on, beside tensors."""

    step: int
    """Completed updates of the run."""
    tokens: int
    """Tokens trained on."""
    phase: str
    """Registry key of the method in charge; the model on disk is built by it."""
    dp_size: int
    """Data-parallel processes; DeepSpeed's shards belong to this many."""
    zero_stage: int
    """ZeRO stage of the shards."""
    method: dict[str, Any]
    """The method's own state; tensors go to a file of their own."""
    telemetry: dict[str, Any]
    """What continues the curves."""
    data: list[str]
    """Fingerprints of the token files."""
    tensor_size: int = 1
    """Tensor-parallel processes; every one has shards of its own."""
    method_shards: Likeness = field(default_factory=dict)
    """How the tensors of the method's state are sharded over them."""


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
        self.is_main = topology.is_main
        self._part = topology.tp.suffix
        self._writes_part = topology.dp_rank == 0

    def save(
        self,
        engine: TrainEngine,
        state: TrainerState,
        config: RunConfig,
        architecture: ModelConfig,
        tokenizer: Path | None,
    ) -> Path:
        """Write a checkpoint of the state after `state.step` updates. A collective call."""
        final = self.directory / f"step_{state.step}"
        staging = final.with_suffix(".tmp")
        if self.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.directory)
        barrier()
        engine.save(str(self.directory), staging.name)
        slices = side_slices(engine)
        tensors = {k: v for k, v in state.method.items() if isinstance(v, torch.Tensor)}
        if slices:
            _save_tensors(slices, staging / _SLICES.format(rank()))
        if self._writes_part:
            _save_tensors(side_tensors(engine), staging / _SIDE.format(self._part))
            if tensors:
                _save_tensors(tensors, staging / METHOD_FILE.format(self._part))
        barrier()  # the manifest lists all of them
        if self.is_main:
            for name in _UNWANTED:
                (self.directory / name).unlink(missing_ok=True)
            plain = {key: v for key, v in state.method.items() if key not in tensors}
            text = json.dumps(asdict(replace(state, method=plain)), indent=1)
            (staging / "trainer.json").write_text(text + "\n")
            (staging / "run.yaml").write_text(dump_run_config(config))
            (staging / "model.json").write_text(architecture.model_dump_json(indent=1) + "\n")
            if tokenizer is not None:
                shutil.copyfile(tokenizer, staging / "tokenizer.model")
            write_manifest(staging)
            self._publish(staging, final)
        barrier()
        return final

    def _publish(self, staging: Path, final: Path) -> None:
        stale = final.with_suffix(".stale")
        if final.exists():  # the same step again, after resuming from an earlier one
            final.rename(stale)
        staging.rename(final)
        pointer = self.directory / f"{LATEST}.tmp"
        pointer.write_text(final.name)
        os.replace(pointer, self.directory / LATEST)
        shutil.rmtree(stale, ignore_errors=True)
        if self.keep is not None:
            older = [path for path in list_checkpoints(self.directory) if path != final]
            for path in older[: max(0, len(older) + 1 - self.keep)]:
                shutil.rmtree(path)

    def load(self, engine: TrainEngine, checkpoint: Path, other: SavedState | None = None) -> None:
        """Restore an engine of the same phase. A collective call.

        Args:
            other: this tensor-parallel rank's part of the checkpoint's state by name, where it was
                written by other processes or at another ZeRO stage.

        Raises:
            CheckpointError: DeepSpeed or the method's state does not fit.
        """
        if other is not None:
            load_state(engine, other)
            return
        engine.load(str(checkpoint.parent), checkpoint.name)
        side = load_file(checkpoint / _SIDE.format(self._part))
        if side_slices(engine):
            side |= load_file(checkpoint / _SLICES.format(rank()))
        load_side_tensors(engine, side)


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints below `directory`, oldest first."""
    found = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` names; None if there is none yet.

    Raises:
        CheckpointError: `latest` names something that is not a checkpoint beside it.
    """
    pointer = directory / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    path = directory / name
    if not _NAME.fullmatch(name) or not path.is_dir():
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
    if (path / "trainer.json").is_file():
        return path
    for directory in (path, path / "checkpoints"):
        found = latest_checkpoint(directory)
        if found is not None:
            return found
    raise CheckpointError(
        f"{path}: no checkpoint here; give a directory step_N, or the one that holds 'latest'"
    )


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """`trainer.json` of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return TrainerState(**json.loads((checkpoint / "trainer.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / 'trainer.json'}: cannot be read ({error}); resume from another one"
        ) from error


def verify_on_main(checkpoint: Path, is_main: bool) -> None:
    """Check a checkpoint's files once, and give every rank the same verdict.

    Raises:
        CheckpointError: on every rank, with rank 0's message.
    """
    problem = None
    if is_main:
        try:
            verify_manifest(checkpoint)
        except CheckpointError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(problem)


def _remove_leftovers(directory: Path) -> None:
    """What an interrupted save left behind was never named, so nobody reads it."""
    for path in directory.glob("step_*.tmp"):
        shutil.rmtree(path)
