"""A saved run by name, whichever way it was sharded when it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relora_ds.checkpoint.find import find_checkpoint
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import RunRecord, read_record
from relora_ds.checkpoint.format.tensors import read_tensors
from relora_ds.checkpoint.format.verify import verify_checkpoint
from relora_ds.checkpoint.inventory import Inventory, take_inventory
from relora_ds.checkpoint.method_state import Likeness, join_parts, likeness_by_name, part_of
from relora_ds.checkpoint.saved_state import SavedState, is_written_state, open_state
from relora_ds.checkpoint.tp_state import JoinedState
from relora_ds.engine.distributed import lost_peers
from relora_ds.engine.precision import base_precision
from relora_ds.errors import CheckpointError, ReloraError
from relora_ds.methods.build import sharded_meta_model, shards_of
from relora_ds.methods.interface import Method
from relora_ds.methods.registry import plan_phases
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.shape import TPShard
from relora_ds.parallel.tensor import SINGLE, TensorParallel
from relora_ds.parallel.topology import part_of_model

_REASON = 300  # characters of a library's own words; some list every parameter
_COUNTING = ("adamw", "adamw8bit", "torch_adamw")
"""Optimizers whose state counts its updates by tensor."""
_UNFITTING = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError)
_UNFITTING += (AssertionError,)  # which DeepSpeed raises over what it reads


class SavedRun:
    """What a checkpoint holds of one phase.

    What it says of itself is read at once, tensors when they are asked for.

    Args:
        checkpoint: a directory `step_N` of any known format.
        record: what it says of itself, where that was read already.

    Raises:
        CheckpointError: see `read_record`; or the files are of different runs.
    """

    def __init__(self, checkpoint: Path, record: RunRecord | None = None) -> None:
        self.checkpoint = checkpoint
        self.record = record or read_record(checkpoint)
        self.method: Method[Any] = self._method_in_charge()
        # rewritten for other processes: by name, and whole
        self._ranks = 1 if is_written_state(checkpoint) else self.record.trainer.tp_size
        parallel = self.record.config.parallel
        self._parallel = parallel.model_copy(update={"tensor": self._ranks})

    @property
    def is_import(self) -> bool:
        """Whether it holds weights that were made elsewhere, for runs to begin with."""
        return self.record.trainer.imported_from is not None

    def is_sharded_like(self, tp: TensorParallel) -> bool:
        """Whether the ranks of a tensor-parallel group hold the parts that the files do."""
        alike = tp.size == 1 or tp.plan == self._parallel.low_rank_plan
        return tp.size == self._ranks and alike

    def state(self) -> SavedState:
        """Weights and optimizer state of the whole model, read when they are asked for.

        Raises:
            CheckpointError: a file is missing, damaged, or of an optimizer that cannot be read so.
        """
        with fitting(self.checkpoint, "its weights and optimizer states"):
            whole = self._inventory(SINGLE)
            stage, dp_size = self.record.trainer.zero_stage, self.record.trainer.dp_size
            if self._ranks == 1:
                state = open_state(self.checkpoint, whole, stage, dp_size)
                self.check_updates(state.completed)
                return state
            groups = self._groups()
            parts = [
                open_state(self.checkpoint, self._inventory(group), stage, dp_size, group)
                for group in groups
            ]
            for part in parts:
                self.check_updates(part.completed)
            return JoinedState(whole, parts, [self.shards(group) for group in groups])

    def check_updates(self, applied: int) -> None:
        """Make sure that the optimizer's own count of updates is that of the checkpoint's step.

        Args:
            applied: updates of the phase that the optimizer says it has applied.

        Raises:
            CheckpointError: it is not: its state is of another step.
        """
        config, state = self.record.config, self.record.trainer
        if config.optimizer.name not in _COUNTING:
            return
        first = next(p.first_step for p in plan_phases(config) if p.name == state.phase)
        expected = state.step - first
        # guards leave updates out, of earlier phases too; they may have been switched off since
        if not expected - state.guards.skipped_steps <= applied <= expected:
            raise CheckpointError(
                f"{self.checkpoint}: its optimizer has applied {applied} updates of the phase "
                f"{state.phase}, but {layout.TRAINER} says {expected}: files of several "
                "checkpoints were mixed; use another one"
            )

    def method_state(self) -> dict[str, Any]:
        """The method's state for the whole model, tensors on the CPU.

        Raises:
            CheckpointError: a file of it is damaged, or misses what another rank's file holds.
        """
        groups = self._groups()
        states = [self._method_file(group) for group in groups]
        if len(states) == 1:
            return states[0]
        with fitting(self.checkpoint, "the entries of its method's state"):
            shards = [self.shards(group) for group in groups]
            return join_parts(states, shards, self.likeness(states[0]))

    def own_method_state(self, tp: TensorParallel) -> dict[str, Any]:
        """One tensor-parallel rank's part of the method's state, as `load_state_dict` takes it.

        Args:
            tp: a rank of the group that continues the run.

        Raises:
            CheckpointError: a file of it is damaged, or misses what another rank's file holds.
        """
        if self.is_sharded_like(tp):
            return self._method_file(tp)
        whole = self.method_state()
        return whole if tp.size == 1 else part_of(whole, self.shards(tp), self.likeness(whole))

    def shards(self, tp: TensorParallel) -> Mapping[str, TPShard]:
        """Which part of every sharded parameter a rank of a tensor-parallel group holds."""
        parts = self.record.architecture, self.method, self.record.config.train
        return shards_of(sharded_meta_model(*parts, tp))

    def likeness(self, state: Mapping[str, Any]) -> Likeness:
        """How the tensors of the method's state are sharded.

        Args:
            state: as `method_state` or `own_method_state` returns it.
        """
        recorded = self.record.trainer.method_shards
        if recorded is None:
            return likeness_by_name(state)
        return {key: (like.parameter, like.dim) for key, like in recorded.items()}

    def _method_in_charge(self) -> Method[Any]:
        phases = {phase.name: phase for phase in plan_phases(self.record.config)}
        name = self.record.trainer.phase
        if name not in phases:
            raise CheckpointError(
                f"{self.checkpoint / layout.TRAINER}: phase is {name!r}, but the run in "
                f"{layout.RUN} has {' and '.join(phases)}: the files are of different runs; use "
                "another checkpoint"
            )
        return phases[name].method

    def _groups(self) -> list[TensorParallel]:
        """The ranks that wrote it."""
        return [part_of_model(self._parallel, rank) for rank in range(self._ranks)]

    def _method_file(self, tp: TensorParallel) -> dict[str, Any]:
        path = self.checkpoint / layout.method(tp.suffix)
        return self.record.trainer.method | (read_tensors(path) if path.is_file() else {})

    def _inventory(self, tp: TensorParallel) -> Inventory:
        config = self.record.config
        dtype = DTYPES[config.train.precision]
        model = sharded_meta_model(self.record.architecture, self.method, config.train, tp)
        precision = base_precision(config)
        return take_inventory(model, self.method, precision, dtype, config.optimizer)


def open_saved_run(path: Path) -> SavedRun:
    """A checkpoint, after making sure that every file of it is what was written.

    Args:
        path: `step_N`, a directory of checkpoints (the latest), or a run directory.

    Raises:
        CheckpointError: there is none, it is not what was written, or cannot be read.
    """
    checkpoint = find_checkpoint(path)
    return SavedRun(checkpoint, verify_checkpoint(checkpoint))


@contextmanager
def fitting(checkpoint: Path, what: str) -> Iterator[None]:
    """Report as a CheckpointError that a saved state lacks something, or has another shape.

    Args:
        checkpoint: where it was read.
        what: its part that is being read, in words.
    """
    try:
        yield
    except ReloraError:
        raise
    except _UNFITTING as error:
        if isinstance(error, RuntimeError) and lost_peers(error):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint}: {what} cannot be those of this run ({type(error).__name__}: "
            f"{reason[:_REASON]}); restore the settings that it was saved with, or use another "
            "checkpoint"
        ) from error
