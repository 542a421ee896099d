"""A saved run by parameter name, whichever way it was cut when it was written.

Per trained parameter the fp32 master and both moments, per frozen one the exact value, and one
count of updates: nothing here knows how many processes or which ZeRO stage will read it. The source
is either DeepSpeed's shards of any stage, which are put together as slices are asked for, or a
directory that `write_state` wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from relora_ds.checkpoint.deepspeed_state import DeepSpeedShards
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.stamp import Origin
from relora_ds.checkpoint.format.tensors import open_tensors, read_tensors, write_tensors
from relora_ds.checkpoint.inventory import Inventory, Pieces
from relora_ds.engine.zero.matrices import STATE_PREFIX
from relora_ds.errors import CheckpointError
from relora_ds.numerics.base_weight import KINDS
from relora_ds.parallel.tensor import SINGLE, TensorParallel

_FILE_BYTES = 2_000_000_000
_STEP = "completed_steps"


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
        pieces: dict[str, Pieces],
    ) -> None:
        self.inventory = inventory
        self.completed = completed
        self.clocks = dict(clocks)
        self._pieces = pieces

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """A slice of a trained parameter's `master` or of a moment of it: 1-D, fp32 but in an
        import, which keeps the dtype of its source.

        Raises:
            CheckpointError: the optimizer that wrote it keeps its moments in another form.
        """
        if f"{kind}.{name}" not in self._pieces:
            raise CheckpointError(
                f"the checkpoint holds no {kind} of {name} by element: its optimizer keeps moments "
                "in blocks; resume with the processes, ZeRO stage and optimizer it was saved with"
            )
        found = self._pieces[f"{kind}.{name}"].read(start, length)
        if found.numel() != length:
            raise CheckpointError(
                f"the checkpoint holds {found.numel()} of {length} elements of the {kind} of "
                f"{name}: it is damaged or of another run; use another one"
            )
        return found

    def matrix_state(self, key: str, name: str) -> torch.Tensor:
        """Optimizer state of a trained parameter that has a shape of its own.

        Raises:
            CheckpointError: the optimizer that wrote it keeps none of this name.
        """
        shape = self.inventory.whole_states(name)[key].shape
        pieces = self._pieces.get(f"{key}.{name}", Pieces())
        if pieces.length != shape.numel():
            raise CheckpointError(
                f"the checkpoint holds {pieces.length} of {shape.numel()} elements of the "
                f"optimizer's {key} of {name}: it was written with another optimizer; resume with "
                "the one it was saved with"
            )
        return pieces.read(0, shape.numel()).view(shape)

    def holds_matrix_state(self, key: str, name: str) -> bool:
        """Whether `matrix_state` has an answer: of one owner's state one part has."""
        return f"{key}.{name}" in self._pieces

    def frozen(self, name: str, start: int, length: int) -> torch.Tensor:
        """A slice of a frozen parameter's exact value: fp32, 1-D."""
        if f"frozen.{name}" in self._pieces:
            return self._pieces[f"frozen.{name}"].read(start, length)
        working = self._pieces[f"working.{name}"].read(start, length)
        if name not in self.inventory.edited:
            return working.float()
        base = KINDS[self.inventory.precision](working.clone(), working.float())
        for key, tensor in base.tensors().items():
            pieces = self._pieces.get(f"base.{name}.{key}", Pieces())
            if pieces.length < start + length:
                raise CheckpointError(
                    f"the checkpoint holds {pieces.length} elements of the {key} of {name}, which "
                    "restores its exact value: it is damaged or of another run; use another one"
                )
            tensor.copy_(pieces.read(start, length))
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
            moments = self.inventory.moments(name) if self.completed else ()
            for kind in ("master", *moments):
                yield f"{kind}.{name}", self.read(kind, name, 0, shape.numel())
            for key in self.inventory.whole_states(name):
                yield f"{key}.{name}", self.matrix_state(key, name).reshape(-1)
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


class AsSaved(Mapping[str, torch.Tensor]):
    """Every trained parameter by name in the dtype that it was saved in, read on access."""

    def __init__(self, state: SavedState) -> None:
        self._state, self._shapes = state, state.inventory.trained

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        return self._state.read("master", name, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_state(state: SavedState, directory: Path, origin: Origin) -> None:
    """Write a state so that any topology can read it; at most one file is held in memory.

    Args:
        origin: of the checkpoint in `directory`.

    Raises:
        CheckpointError: a tensor of it is damaged, or holds values that are not finite.
    """
    write_parts(_finite(state.tensors()), state.completed, directory, origin)


def _finite(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{key} holds values that are not finite: the run diverged before this checkpoint "
                "was saved, and nothing can go on from it; use an earlier one"
            )
        yield key, tensor


def write_parts(
    tensors: Iterable[tuple[str, torch.Tensor]], completed: int, directory: Path, origin: Origin
) -> None:
    """Write flat tensors of a state by key; at most one file is held in memory.

    Args:
        tensors: as `SavedState.tensors` has them.
        completed: updates of the phase that were done.
        origin: of the checkpoint in `directory`.
    """
    pending: dict[str, torch.Tensor] = {_STEP: torch.tensor(completed)}
    size, number = 0, 0
    for key, tensor in tensors:
        grown = tensor.numel() * tensor.element_size()
        if pending and size + grown > _FILE_BYTES:
            write_tensors(pending, directory / layout.state(number), origin)
            pending, size, number = {}, 0, number + 1
        pending[key] = tensor
        size += grown
    write_tensors(pending, directory / layout.state(number), origin)


def is_written_state(directory: Path) -> bool:
    """Whether `write_state` wrote the directory's weights, not DeepSpeed."""
    return (directory / layout.state(0)).is_file()


def open_state(
    directory: Path,
    inventory: Inventory,
    stage: int,
    dp_size: int,
    tp: TensorParallel = SINGLE,
) -> SavedState:
    """The state in a checkpoint; large tensors are read when they are asked for.

    Args:
        inventory: of what the tensor-parallel rank holds.
        stage: ZeRO stage that it was written at.
        dp_size: data-parallel processes that wrote it.
        tp: the rank, of as many as wrote it, whose part is read.

    Raises:
        CheckpointError: a file is missing or damaged, or of another run.
    """
    side = read_tensors(directory / layout.side(tp.suffix))
    clocks = {name: tp for name, tp in side.items() if name.startswith("clock.")}
    if is_written_state(directory):
        completed, pieces = _written_pieces(directory)
    else:
        reader = DeepSpeedShards(directory, inventory, stage, dp_size, tp.rank)
        completed, pieces = reader.completed, reader.pieces
        # at stage 3 what lies beside the edited weights is sliced like them
        needed = stage == 3 and inventory.edited and inventory.precision != "working"
        ranks = [tp.rank + copy * tp.size for copy in range(dp_size)]
        paths = [directory / layout.side_of_rank(rank) for rank in ranks]
        # a rank that owns no matrix-wise state writes none
        slices = [read_tensors(path) for path in paths if needed or path.is_file()]
        for part in (side, *slices):
            for key, values in part.items():
                target = _piece_of(key)
                if target is not None:
                    pieces.setdefault(target, Pieces()).append(values.view(-1), values.numel())
    _check_complete(directory, inventory, pieces)
    return SavedState(inventory, completed, clocks, pieces)


def _check_complete(directory: Path, inventory: Inventory, pieces: Mapping[str, Pieces]) -> None:
    for name, shape in (inventory.trained | inventory.frozen).items():
        kinds = ("master",) if name in inventory.trained else ("frozen", "working")
        found = max(pieces.get(f"{kind}.{name}", Pieces()).length for kind in kinds)
        if found < shape.numel():
            raise CheckpointError(
                f"{directory}: holds {found} of {shape.numel()} elements of {name}: it is damaged "
                "or of another run; use another one"
            )


def _written_pieces(directory: Path) -> tuple[int, dict[str, Pieces]]:
    pieces: dict[str, Pieces] = {}
    completed: int | None = None
    for path in sorted(directory.glob(layout.STATES)):
        file = open_tensors(path)
        for key in file.keys():  # noqa: SIM118 - not a mapping
            if key == _STEP:
                completed = int(file.get_tensor(key))
                continue
            if key in pieces:
                raise CheckpointError(f"{path}: holds {key} once more; use another checkpoint")
            part = file.get_slice(key)
            pieces[key] = Pieces()
            pieces[key].append(part, part.get_shape()[0])
    if completed is None:
        raise CheckpointError(f"{directory / layout.state(0)}: holds no {_STEP}; use another one")
    return completed, pieces


def _piece_of(key: str) -> str | None:
    """The piece that a tensor beside DeepSpeed's shards belongs to."""
    if key.startswith("base."):
        return key
    if key.startswith(f"{STATE_PREFIX}."):
        name, _, state = key.removeprefix(f"{STATE_PREFIX}.").rpartition(".")
        return f"{state}.{name}"
    return None
