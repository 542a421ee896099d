"""A saved run by parameter name, whichever way it was cut when it was written.

Per trained parameter the fp32 master and both moments, per frozen one the exact value, and one
count of updates: nothing here knows how many processes or which ZeRO stage will read it. The source
is either DeepSpeed's shards of any stage, which are put together as slices are asked for, or a
directory that `write_state` wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from relora_ds.engine.base_weight import KINDS, Precision
from relora_ds.engine.layout import slice_of
from relora_ds.engine.shards import (
    load_model_states,
    load_optimizer_states,
    load_whole_model,
)
from relora_ds.errors import CheckpointError
from relora_ds.methods.interface import Method
from relora_ds.parallel.shape import whole_shape
from relora_ds.parallel.tensor import SINGLE, TensorParallel

MOMENTS = ("exp_avg", "exp_avg_sq")
_FILE = "state-{:05d}.safetensors"
_FILE_BYTES = 2_000_000_000
_STEP = "completed_steps"


@dataclass(frozen=True)
class Inventory:
    """The parameters of a phase, the same for every topology."""

    groups: list[dict[str, torch.Size]]
    """Trained parameters per optimizer group, in the group's order."""
    frozen: dict[str, torch.Size]
    edited: frozenset[str]
    """Frozen ones with an authoritative value beside the working one."""
    precision: Precision
    """How that is kept."""
    dtype: torch.dtype
    """What the model computes in."""

    @property
    def trained(self) -> dict[str, torch.Size]:
        """Of all groups."""
        return {name: shape for group in self.groups for name, shape in group.items()}


def take_inventory(
    model: nn.Module, method: Method[Any], precision: Precision, dtype: torch.dtype
) -> Inventory:
    """Names and shapes of a model, which may be without memory."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {names[id(p)]: whole_shape(p) for p in group.parameters}
        for group in method.parameter_groups(model)
    ]
    frozen = {n: whole_shape(p) for n, p in model.named_parameters() if not p.requires_grad}
    edited = frozenset(names[id(weight)] for weight in method.edited_weights(model))
    return Inventory(groups, frozen, edited, precision, dtype)


@dataclass
class _Pieces:
    """A flattened tensor in consecutive parts, each sliced when it is asked for."""

    parts: list[tuple[int, int, Any]] = field(default_factory=list)
    """First element, number of elements, and what `[start:stop]` reads them from."""

    def append(self, part: Any, length: int) -> None:
        self.parts.append((self.length, length, part))

    @property
    def length(self) -> int:
        return self.parts[-1][0] + self.parts[-1][1] if self.parts else 0

    def read(self, start: int, length: int) -> torch.Tensor:
        found = []
        for first, count, part in self.parts:
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                found.append(part[low - first : high - first])
        return torch.cat(found) if found else torch.empty(0)


class SavedState:
    """Values by name; every read is a slice of a flattened parameter, on the CPU.

    Args:
        completed: updates of the phase that were done.
        clocks: births and thaws of vectors by the names of `TrainEngine.side_tensors`.
    """

    def __init__(
        self,
        inventory: Inventory,
        completed: int,
        clocks: Mapping[str, torch.Tensor],
        pieces: dict[str, _Pieces],
    ) -> None:
        self.inventory = inventory
        self.completed = completed
        self.clocks = dict(clocks)
        self._pieces = pieces

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """A slice of a trained parameter's `master` or of one of its `MOMENTS`: fp32, 1-D.

        Raises:
            CheckpointError: the optimizer that wrote it keeps its moments in another form.
        """
        if f"{kind}.{name}" not in self._pieces:
            raise CheckpointError(
                f"the checkpoint holds no {kind} of {name} by element: its optimizer keeps moments "
                "in blocks; resume with the processes, ZeRO stage and optimizer it was saved with"
            )
        return self._pieces[f"{kind}.{name}"].read(start, length)

    def frozen(self, name: str, start: int, length: int) -> torch.Tensor:
        """A slice of a frozen parameter's exact value: fp32, 1-D."""
        if f"frozen.{name}" in self._pieces:
            return self._pieces[f"frozen.{name}"].read(start, length)
        working = self._pieces[f"working.{name}"].read(start, length)
        if name not in self.inventory.edited:
            return working.float()
        base = KINDS[self.inventory.precision](working.clone(), working.float())
        for key, tensor in base.tensors().items():
            tensor.copy_(self._pieces[f"base.{name}.{key}"].read(start, length))
        return base.load(working, 0)

    def working(self, name: str) -> torch.Tensor:
        """A whole parameter as the forward pass uses it, in the model's dtype."""
        trained = self.inventory.trained
        if name in trained:
            whole = self.read("master", name, 0, trained[name].numel())
            return whole.to(self.inventory.dtype).view(trained[name])
        shape = self.inventory.frozen[name]
        if f"working.{name}" in self._pieces:
            return self._pieces[f"working.{name}"].read(0, shape.numel()).view(shape)
        value = torch.empty(shape.numel(), dtype=self.inventory.dtype)
        kind = self.inventory.precision if name in self.inventory.edited else "working"
        KINDS[kind](value, self.frozen(name, 0, shape.numel()))  # it rounds ties its own way
        return value.view(shape)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything, whole, one at a time, by the keys of the files that `write_state` writes."""
        for name, shape in self.inventory.trained.items():
            for kind in ("master", *(MOMENTS if self.completed else ())):
                yield f"{kind}.{name}", self.read(kind, name, 0, shape.numel())
        for name, shape in self.inventory.frozen.items():
            yield f"frozen.{name}", self.frozen(name, 0, shape.numel())


class WorkingValues(Mapping[str, torch.Tensor]):
    """Every parameter as the forward pass uses it, by name, read on access."""

    def __init__(self, state: SavedState) -> None:
        self._state = state
        self._names = [*state.inventory.trained, *state.inventory.frozen]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state.working(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_state(state: SavedState, directory: Path) -> None:
    """Write a state so that any topology can read it; at most one file is held in memory."""
    pending: dict[str, torch.Tensor] = {_STEP: torch.tensor(state.completed)}
    size, number = 0, 0
    for key, tensor in state.tensors():
        grown = tensor.numel() * tensor.element_size()
        if pending and size + grown > _FILE_BYTES:
            save_file(pending, directory / _FILE.format(number))
            pending, size, number = {}, 0, number + 1
        pending[key] = tensor.contiguous()
        size += grown
    save_file(pending, directory / _FILE.format(number))


def is_written_state(directory: Path) -> bool:
    """Whether `write_state` wrote the directory's weights, not DeepSpeed."""
    return (directory / _FILE.format(0)).is_file()


def open_state(
    directory: Path,
    inventory: Inventory,
    stage: int,
    dp_size: int,
    tensor: TensorParallel = SINGLE,
) -> SavedState:
    """The state in a checkpoint; large tensors are read when they are asked for.

    Args:
        inventory: of what the tensor-parallel rank holds.
        stage: ZeRO stage that it was written at.
        dp_size: data-parallel processes that wrote it.
        tensor: the rank, of as many as wrote it, whose part is read.

    Raises:
        CheckpointError: a file is missing or damaged, or of another run.
    """
    side = _load_side(directory / f"side{tensor.suffix}.safetensors")
    clocks = {name: tensor for name, tensor in side.items() if name.startswith("clock.")}
    if is_written_state(directory):
        completed, pieces = _written_pieces(directory)
    else:
        reader = _Shards(directory, inventory, stage, dp_size, tensor.rank)
        completed, pieces = reader.completed, reader.pieces
        # at stage 3 what lies beside the edited weights is cut like them
        cut = stage == 3 and inventory.edited and inventory.precision != "working"
        ranks = [tensor.rank + copy * tensor.size for copy in range(dp_size)] if cut else []
        names = [f"side_rank_{rank}.safetensors" for rank in ranks]
        slices = [_load_side(directory / name) for name in names] or [side]
        for part in slices:
            for key, values in part.items():
                if key.startswith("base."):
                    pieces.setdefault(key, _Pieces()).append(values, values.numel())
    _check_complete(directory, inventory, pieces)
    return SavedState(inventory, completed, clocks, pieces)


def _check_complete(directory: Path, inventory: Inventory, pieces: Mapping[str, _Pieces]) -> None:
    for name, shape in (inventory.trained | inventory.frozen).items():
        kinds = ("master",) if name in inventory.trained else ("frozen", "working")
        found = max(pieces.get(f"{kind}.{name}", _Pieces()).length for kind in kinds)
        if found < shape.numel():
            raise CheckpointError(
                f"{directory}: holds {found} of {shape.numel()} elements of {name}: it is damaged "
                "or of another run; use another one"
            )


def _written_pieces(directory: Path) -> tuple[int, dict[str, _Pieces]]:
    pieces, completed = {}, 0
    for path in sorted(directory.glob("state-*.safetensors")):
        file = _open(path)
        for key in file.keys():  # noqa: SIM118 - not a mapping
            if key == _STEP:
                completed = int(file.get_tensor(key))
                continue
            part = file.get_slice(key)
            pieces[key] = _Pieces()
            pieces[key].append(part, part.get_shape()[0])
    return completed, pieces


class _Shards:
    """DeepSpeed's files of one stage as pieces by name."""

    def __init__(
        self, directory: Path, inventory: Inventory, stage: int, dp_size: int, tensor_rank: int
    ) -> None:
        self.inventory = inventory
        self._tensor_rank = tensor_rank
        self.directory = directory
        self._dp_size = dp_size
        self.completed = 0
        self.pieces: dict[str, _Pieces] = {}
        if stage == 3:
            self._read_partitions(dp_size)
            return
        model = load_whole_model(directory, tensor_rank)
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
        shards = [
            load_optimizer_states(self.directory, rank, self._tensor_rank)
            for rank in range(dp_size)
        ]
        for number, group in enumerate(self.inventory.groups):
            whole: dict[str, _Pieces] = {key: _Pieces() for key in ("master", *MOMENTS)}
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
                        self._add(f"{key}.{name}", _View(pieces, at), shape.numel())
                at += shape.numel()

    def _read_partitions(self, dp_size: int) -> None:
        """Stage 3: every parameter is cut by itself; a rank's parts of trained ones in sequence."""
        models = [
            load_model_states(self.directory, rank, self._tensor_rank) for rank in range(dp_size)
        ]
        for name, shape in self.inventory.frozen.items():
            for model in models:
                self._add_slice(f"working.{name}", model["frozen_param_fragments"][name], shape)
        for rank in range(dp_size):
            flats, at = self._flats_of_rank(rank), 0
            for name, shape in self.inventory.trained.items():
                for key, pieces in flats.items():
                    if pieces.length:
                        self._add_slice(f"{key}.{name}", _View(pieces, at), shape)
                at += slice_of(shape.numel(), 0, dp_size)[1]

    def _flats_of_rank(self, rank: int) -> dict[str, _Pieces]:
        """A rank's slices of all trained parameters, of all sub-groups one after the other."""
        shard = load_optimizer_states(self.directory, rank, self._tensor_rank)
        flats = {key: _Pieces() for key in ("master", *MOMENTS)}
        for index, flat in enumerate(shard["fp32_flat_groups"]):
            flats["master"].append(flat.detach(), flat.numel())
            state = shard["optimizer_state_dict"]["state"].get(index, {})
            self._note_step(state)
            for key in MOMENTS:
                if _is_moment(state.get(key)):
                    flats[key].append(state[key], state[key].numel())
        return flats

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
        if "step" in state:
            self.completed = max(self.completed, int(state["step"]))

    def _add(self, key: str, part: Any, length: int | None = None) -> None:
        if isinstance(part, torch.Tensor):
            part = part.detach().view(-1)
            length = part.numel() if length is None else length
        self.pieces.setdefault(key, _Pieces()).append(part, cast(int, length))


@dataclass(frozen=True)
class _View:
    """Elements of pieces from an offset on, sliced like a tensor."""

    pieces: _Pieces
    at: int

    def __getitem__(self, index: slice) -> torch.Tensor:
        return self.pieces.read(self.at + index.start, index.stop - index.start)


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _load_side(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another one") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another one") from error
