"""DeepSpeed's shards of any ZeRO stage, put together as pieces by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from relora_ds.checkpoint.inventory import Inventory, Pieces, PiecesView
from relora_ds.engine.deepspeed.files import (
    model_file,
    open_shard,
    optimizer_file,
    sliced_model_file,
)
from relora_ds.errors import CheckpointError
from relora_ds.optim.vector_adamw import MOMENTS
from relora_ds.parallel.shape import slice_of


class DeepSpeedShards:
    """DeepSpeed's files of one stage as pieces by name."""

    def __init__(
        self, directory: Path, inventory: Inventory, stage: int, dp_size: int, tensor_rank: int
    ) -> None:
        self.inventory = inventory
        self._tensor_rank = tensor_rank
        self.directory = directory
        self._dp_size = dp_size
        self.completed = 0
        self.pieces: dict[str, Pieces] = {}
        if stage == 3:
            self._read_partitions(dp_size)
            return
        model = open_shard(directory / model_file(tensor_rank))
        _check_shapes(directory, inventory, {n: v.shape for n, v in model["module"].items()})
        for name in inventory.frozen:
            self._add(f"working.{name}", model["module"][name])
        if stage:
            self._read_flats(dp_size)
        else:
            self._read_whole(model)

    def _read_whole(self, model: Mapping[str, Any]) -> None:
        """Stage 0: moments per parameter, numbered through all groups; masters if it was cast."""
        names = list(self.inventory.trained)
        saved = model["optimizer"]
        states, masters = saved.get("state"), model.get("masters") or []
        if states is None:  # DeepSpeed's wrapper of bf16 models
            states = saved["optimizer_state_dict"]["state"]
            masters = [master for group in saved["fp32_groups"] for master in group]
        values = masters or [model["module"][name] for name in names]
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            self._add(f"master.{name}", value)
            self._add_moments(name, states.get(index, {}))

    def _read_flats(self, dp_size: int) -> None:
        """Stages 1 and 2: a group is one flat tensor, cut into one part per rank; padding last."""
        shards = [self._optimizer_states(rank) for rank in range(dp_size)]
        for number, group in enumerate(self.inventory.groups):
            whole: dict[str, Pieces] = {key: Pieces() for key in ("master", *MOMENTS)}
            for shard in shards:
                part = shard["single_partition_of_fp32_groups"][number].detach()
                whole["master"].append(part, part.numel())
                state = shard["base_optimizer_state"]["state"].get(number, {})
                self._note_step(state)
                for key in MOMENTS:
                    if _is_moment(state.get(key)):
                        whole[key].append(state[key], state[key].numel())
            at = 0
            for name, shape in group.items():
                for key, pieces in whole.items():
                    if pieces.length:
                        self._add(f"{key}.{name}", PiecesView(pieces, at), shape.numel())
                at += shape.numel()

    def _read_partitions(self, dp_size: int) -> None:
        """Stage 3: every parameter is cut by itself; a rank's parts of trained ones in sequence."""
        names = [sliced_model_file(rank, self._tensor_rank) for rank in range(dp_size)]
        models = [open_shard(self.directory / name) for name in names]
        saved = [*models[0]["param_shapes"], models[0]["frozen_param_shapes"] or {}]
        shapes = {name: shape for part in saved for name, shape in part.items()}
        _check_shapes(self.directory, self.inventory, shapes)
        for name, shape in self.inventory.frozen.items():
            for model in models:
                self._add_slice(f"working.{name}", model["frozen_param_fragments"][name], shape)
        for rank in range(dp_size):
            flats, at = self._flats_of_rank(rank), 0
            for name, shape in self.inventory.trained.items():
                for key, pieces in flats.items():
                    if key == "master" or name not in self.inventory.matrix_states:
                        self._add_slice(f"{key}.{name}", PiecesView(pieces, at), shape)
                at += slice_of(shape.numel(), 0, dp_size)[1]

    def _optimizer_states(self, rank: int) -> dict[str, Any]:
        name = optimizer_file(rank, self._tensor_rank, self.inventory.dtype)
        return open_shard(self.directory / name)["optimizer_state_dict"]

    def _flats_of_rank(self, rank: int) -> dict[str, Pieces]:
        """A rank's slices of all trained parameters, of all sub-groups one after the other; of a
        sub-group without moments, which is updated matrix-wise, zeros that nobody asks for."""
        shard = self._optimizer_states(rank)
        flats, present = {key: Pieces() for key in ("master", *MOMENTS)}, {"master"}
        for index, flat in enumerate(shard["fp32_flat_groups"]):
            flats["master"].append(flat.detach(), flat.numel())
            state = shard["optimizer_state_dict"]["state"].get(index, {})
            self._note_step(state)
            for key in MOMENTS:
                moment = state.get(key)
                if _is_moment(moment):
                    present.add(key)
                filler = torch.zeros(1).expand(flat.numel())
                flats[key].append(moment if _is_moment(moment) else filler, flat.numel())
        return {key: pieces for key, pieces in flats.items() if key in present}

    def _add_slice(self, key: str, part: Any, shape: torch.Size) -> None:
        """Append the next rank's slice without its padding."""
        held = self.pieces[key].length if key in self.pieces else 0
        share = slice_of(shape.numel(), 0, self._dp_size)[1]
        self._add(key, part, min(share, shape.numel() - held))

    def _add_moments(self, name: str, state: Mapping[str, Any]) -> None:
        self._note_step(state)
        for key in MOMENTS:
            if _is_moment(state.get(key)):
                self._add(f"{key}.{name}", state[key])

    def _note_step(self, state: Mapping[str, Any]) -> None:
        if "step" not in state:
            return
        step = int(state["step"])
        if self.completed not in (0, step):
            raise CheckpointError(
                f"{self.directory}: parts of the optimizer's state are of its updates "
                f"{self.completed} and {step}: files of several checkpoints were mixed; use another"
            )
        self.completed = step

    def _add(self, key: str, part: Any, length: int | None = None) -> None:
        if isinstance(part, torch.Tensor):
            part = part.detach().view(-1)
            length = part.numel() if length is None else length
        self.pieces.setdefault(key, Pieces()).append(part, cast(int, length))


def _check_shapes(directory: Path, inventory: Inventory, found: Mapping[str, torch.Size]) -> None:
    for name, shape in (inventory.trained | inventory.frozen).items():
        if found.get(name) != shape:
            held = f"as {tuple(found[name])}" if name in found else "not at all"
            raise CheckpointError(
                f"{directory}: holds {name} {held}, but its run has it as {tuple(shape)}: the "
                "files are of different runs; use another checkpoint"
            )


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
