"""A saved run by name, whichever way it was cut when it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from relora_ds.checkpoint.inventory import Inventory, take_inventory
from relora_ds.checkpoint.method_state import Likeness, join_parts, likeness_by_name, part_of
from relora_ds.checkpoint.saved_state import SavedState, is_written_state, open_state
from relora_ds.checkpoint.store import METHOD_FILE, TrainerState, read_trainer_state
from relora_ds.checkpoint.tp_state import JoinedState
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.source import read_yaml
from relora_ds.config.schema import RunConfig
from relora_ds.engine.precision import base_precision
from relora_ds.methods.build import sharded_meta_model, shards_of
from relora_ds.methods.interface import Method
from relora_ds.methods.registry import plan_phases
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.shape import TPShard
from relora_ds.parallel.tensor import SINGLE, TensorParallel
from relora_ds.parallel.topology import part_of_model


def read_run(checkpoint: Path) -> tuple[RunConfig, ModelConfig]:
    """The resolved run and the architecture that a checkpoint belongs to."""
    config = read_yaml(checkpoint / "run.yaml").data
    architecture = (checkpoint / "model.json").read_text()
    return (
        RunConfig.model_validate_json(json.dumps(config)),
        ModelConfig.model_validate_json(architecture),
    )


class SavedRun:
    """What a checkpoint holds of one phase.

    Args:
        checkpoint: a directory `step_N`.
        config: the run, of which the checkpoint is; how it is cut may differ.
        architecture: its model.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, architecture: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.trainer: TrainerState = read_trainer_state(checkpoint)
        self._config, self._architecture = config, architecture
        phases = {phase.name: phase for phase in plan_phases(config)}
        self.method: Method[Any] = phases[self.trainer.phase].method
        # rewritten for other processes: by name, and whole
        self._ranks = 1 if is_written_state(checkpoint) else self.trainer.tensor_size
        self._parallel = read_run(checkpoint)[0].parallel.model_copy(update={"tensor": self._ranks})

    def is_sharded_like(self, tp: TensorParallel) -> bool:
        """Whether the ranks of the group hold the parts that the files do."""
        alike = tp.size == 1 or tp.plan == self._parallel.low_rank_plan
        return tp.size == self._ranks and alike

    def state(self) -> SavedState:
        """Weights and optimizer state of the whole model, read when they are asked for.

        Raises:
            CheckpointError: a file is missing, damaged, or of an optimizer that cannot be read so.
        """
        whole = self._inventory(SINGLE)
        stage, dp_size = self.trainer.zero_stage, self.trainer.dp_size
        if self._ranks == 1:
            return open_state(self.checkpoint, whole, stage, dp_size)
        groups = self._groups()
        parts = [
            open_state(self.checkpoint, self._inventory(group), stage, dp_size, group)
            for group in groups
        ]
        return JoinedState(whole, parts, [self.shards(group) for group in groups])

    def method_state(self) -> dict[str, Any]:
        """The method's state for the whole model, on the CPU."""
        groups = self._groups()
        states = [self._method_file(group) for group in groups]
        if len(states) == 1:
            return states[0]
        return join_parts(states, [self.shards(group) for group in groups], self._likeness())

    def own_method_state(self, tp: TensorParallel) -> dict[str, Any]:
        """The same for one rank of a tensor-parallel group, as `load_state_dict` takes it."""
        if self.is_sharded_like(tp):
            return self._method_file(tp)
        whole = self.method_state()
        return whole if tp.size == 1 else part_of(whole, self.shards(tp), self._likeness())

    def shards(self, tp: TensorParallel) -> Mapping[str, TPShard]:
        """Which part of every cut parameter a rank of a tensor-parallel group holds."""
        parts = self._architecture, self.method, self._config.train
        return shards_of(sharded_meta_model(*parts, tp))

    def _likeness(self) -> Likeness:
        return self.trainer.method_shards or likeness_by_name(self._method_file(self._groups()[0]))

    def _groups(self) -> list[TensorParallel]:
        """The ranks that wrote it."""
        return [part_of_model(self._parallel, rank) for rank in range(self._ranks)]

    def _method_file(self, tp: TensorParallel) -> dict[str, Any]:
        path = self.checkpoint / METHOD_FILE.format(tp.suffix)
        return self.trainer.method | (load_file(path) if path.is_file() else {})

    def _inventory(self, tp: TensorParallel) -> Inventory:
        train = self._config.train
        dtype = DTYPES[train.precision]
        model = sharded_meta_model(self._architecture, self.method, train, tp)
        return take_inventory(
            model, self.method, base_precision(self._config), dtype, self._config.optimizer
        )
