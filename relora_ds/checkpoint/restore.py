"""A saved state into a live engine, and what DeepSpeed does not save of one.

Beside DeepSpeed's shards a checkpoint holds the clocks of vectors and whatever restores edited
weights exactly: `side_tensors`, the same on every rank, and `side_slices`, which differ by rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from relora_ds.checkpoint.saved_state import SavedState
from relora_ds.engine.engine import TrainEngine
from relora_ds.engine.islands.rounds import Rounds, numbered
from relora_ds.errors import CheckpointError
from relora_ds.optim.grouped import GroupedOptimizer
from relora_ds.optim.vector_adamw import MOMENTS, VectorAdamW, storage_key
from relora_ds.parallel.topology import Topology


@torch.no_grad()
def load_state(engine: TrainEngine, saved: SavedState) -> None:
    """Restore a state that may have been saved with another number of processes or stage.

    Every rank reads its own slices.

    Raises:
        CheckpointError: the optimizer keeps its moments in another form, or the clocks are of
            another method.
    """
    if type(engine.optimizer) not in (GroupedOptimizer, VectorAdamW, torch.optim.AdamW):
        raise CheckpointError(
            "a checkpoint of other processes or another ZeRO stage can be continued with "
            "optimizer.name adamw or torch_adamw only: the others keep moments in blocks or "
            "kernels of their own; resume with the processes and stage it was saved with"
        )
    for owner in engine.layout.owners() if saved.completed else ():
        engine.optimizer.state[owner] = {
            "step": torch.tensor(float(saved.completed)),
            **({} if storage_key(owner) in engine.matrices.placed else _no_moments(owner)),
        }
    for name, parameter in engine.model.named_parameters():
        start, working = engine.layout.working(parameter)
        if parameter in engine.layout.placements:
            _load_trained(engine, saved, name, parameter)
            working.copy_(saved.read("master", name, start, working.numel()))
        else:
            exact = saved.frozen(name, start, working.numel()).to(working.device)
            if parameter in engine.bases:
                engine.bases[parameter].store(working, 0, exact)
            else:
                working.copy_(exact)
        engine.layout.drop_copies(parameter)
    # what was just loaded slice by slice is its own source
    loaded = _base_tensors(engine) | engine.matrices.side_tensors() | engine.matrices.side_slices()
    load_side_tensors(engine, saved.clocks | loaded)


def _load_trained(
    engine: TrainEngine, saved: SavedState, name: str, parameter: nn.Parameter
) -> None:
    placement = engine.layout.placements[parameter]
    start, length = placement.stretch.start, placement.stretch.length
    placement.master().copy_(saved.read("master", name, start, length))
    if parameter in engine.matrices.by_parameter:
        _load_matrix(engine, saved, name, parameter)
        return
    for key in MOMENTS if saved.completed and length else ():
        own = engine.layout.optimizer_state(parameter, key)
        assert own is not None
        own.copy_(saved.read(key, name, start, length))


def _no_moments(owner: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(owner, dtype=torch.float32) for key in MOMENTS}


def _load_matrix(
    engine: TrainEngine, saved: SavedState, name: str, parameter: nn.Parameter
) -> None:
    """State of a parameter that is updated matrix-wise: this rank's slice, or all of what it
    holds whole."""
    stretch = engine.layout.placements[parameter].stretch
    sliced = saved.inventory.moments(name)
    for key, tensor in engine.matrices.by_parameter[parameter].state.items():
        if key in sliced:
            tensor.copy_(saved.read(key, name, stretch.start, stretch.length))
        else:
            tensor.copy_(saved.matrix_state(key, name))


def check_moments(engine: TrainEngine) -> None:
    """Make sure that restored moments are what the optimizer keeps of what they belong to.

    DeepSpeed takes them as they are, and torch would stretch one element over a whole tensor.

    Raises:
        CheckpointError: they are of another tensor, or of another optimizer.
    """
    for owner in engine.layout.owners():
        held = {
            key: tensor
            for key, tensor in engine.optimizer.state.get(owner, {}).items()
            if key != "step"
        }
        for key, tensor in held.items():
            if key in MOMENTS and tensor.numel() != owner.numel():
                raise CheckpointError(
                    f"the checkpoint's optimizer states hold {tensor.numel()} of {owner.numel()} "
                    f"elements of a tensor's {key}: they are damaged or of another run; use "
                    "another checkpoint"
                )
        kept = _state_forms(engine.optimizer, owner)
        if held and _kinds(held) != _kinds(kept):
            raise CheckpointError(
                f"the checkpoint's optimizer keeps {_kinds(held)} of a tensor, but that of the run "
                f"keeps {_kinds(kept)}: they are different ones; restore optimizer.name"
            )


def _state_forms(
    optimizer: torch.optim.Optimizer, owner: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """What an optimizer keeps of a tensor beside its `step`, in forms without memory."""
    if isinstance(optimizer, VectorAdamW):
        return optimizer.state_forms(owner)
    return {key: torch.empty_like(owner, dtype=torch.float32, device="meta") for key in MOMENTS}


def _kinds(state: Mapping[str, torch.Tensor]) -> str:
    """Names and types in a state: `exp_avg float32, exp_avg_sq float32`."""
    kinds = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in state.items()}
    return ", ".join(f"{key} {kinds[key]}" for key in sorted(kinds)) or "nothing"


def side_tensors(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """State that DeepSpeed does not know, the same on every rank, as live tensors by name."""
    names = engine.names()
    tensors = {}
    for parameter, clock in engine.clocks.items():
        for key, tensor in clock.tensors().items():
            tensors[f"clock.{names[parameter]}.{key}"] = tensor
    tensors |= engine.matrices.side_tensors()
    return tensors if engine.layout.weights_sharded else tensors | _base_tensors(engine)


def side_slices(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """More of the same that differs by rank: what lies beside this rank's slices of weights."""
    slices = engine.matrices.side_slices()
    return slices | _base_tensors(engine) if engine.layout.weights_sharded else slices


def _base_tensors(engine: TrainEngine) -> dict[str, torch.Tensor]:
    names = engine.names()
    return {
        f"base.{names[weight]}.{key}": tensor
        for weight, base in engine.bases.items()
        for key, tensor in base.tensors().items()
    }


def round_tensors(engine: TrainEngine, topology: Topology) -> dict[str, torch.Tensor]:
    """What this rank saves of islands that train apart, as live tensors by name.

    The first island's moments, and its weights, are where they are without islands, those of others
    are here. The momentum of the outer step is common, and saved by the first island; each keeps
    what its codes left out. Weights are common wherever a run saves by itself; where it was asked
    to stop within a round, the common weights of before and what is on its way are here too.
    """
    if engine.rounds is None:
        return {}
    if engine.layout.partition_group is None and topology.dp_rank > 0:  # the first one has it all
        return {}
    state = engine.rounds.state()
    own = {name: tensor for name, tensor in state.items() if _kind(name) in _OF_ISLANDS}
    own |= numbered("residual", engine.rounds.residual)
    if topology.islands.rank == 0:
        shared = {name: tensor for name, tensor in state.items() if name not in own}
        own = {name: tensor for name, tensor in own.items() if _kind(name) != "master"}
        return own | shared | numbered("momentum", engine.rounds.momentum)
    return own | _own_moments(engine)


_OF_ISLANDS = ("master", "sent")
"""Kinds of what an island has of its own of a round that is under way."""
_OF_ALL = ("anchor", "mean", "left")
"""Kinds of what islands have in common of it."""


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _own_moments(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """State of the optimizer, element by element and by matrix, that this rank's island has alone,
    as live tensors by name."""
    elementwise = {
        f"moments.{number}.{key}": value
        for number, owner in enumerate(engine.layout.owners())
        for key, value in engine.optimizer.state.get(owner, {}).items()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    matrices = engine.matrices.side_tensors() | engine.matrices.side_slices()
    return elementwise | {f"moments.{name}": tensor for name, tensor in matrices.items()}


def load_round_tensors(
    engine: TrainEngine, first: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor] | None
) -> None:
    """Restore `round_tensors` in place, after everything else was.

    What was not saved begins anew: without islands there was no momentum, and an island that was
    not there has left nothing out and goes on with the moments of the first one.

    Args:
        first: of this rank's place on the first island.
        own: of the same place on this island; None where there was no such island.

    Raises:
        CheckpointError: names, shapes or kinds of numbers are not the ones of this run.
    """
    assert engine.rounds is not None
    momentum = numbered("momentum", engine.rounds.momentum)
    residual = numbered("residual", engine.rounds.residual)
    under_way = _round_under_way(engine.rounds, first, own)
    saved = {name: tensor for name, tensor in first.items() if name in momentum}
    live = momentum | residual
    if own is not None:
        other = {*momentum, *under_way}
        saved |= {name: tensor for name, tensor in own.items() if name not in other}
        live |= _own_moments(engine) if any(n.startswith("moments") for n in own) else {}
    fresh = {name: torch.zeros_like(live[name]) for name in live if name not in saved}
    _check_names(live, saved | fresh)
    for name, tensor in live.items():
        _check_form(name, (saved | fresh)[name], tensor)
    for name, tensor in live.items():
        tensor.copy_((saved | fresh)[name])
    if under_way:
        engine.rounds.go_on(under_way)


def _round_under_way(
    rounds: Rounds, first: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """`Rounds.state` as it was saved; empty if weights were common.

    Raises:
        CheckpointError: names, shapes or kinds of numbers are not the ones of this run.
    """
    saved = {name: tensor for name, tensor in first.items() if _kind(name) in _OF_ALL}
    if not saved:
        return {}
    apart = (first if own is None else own).items()
    saved |= {name: tensor for name, tensor in apart if _kind(name) in _OF_ISLANDS}
    # those of the first island, and of one that is new, are the ones that were loaded
    saved = rounds.masters() | saved
    forms = rounds.forms("left" in saved)
    _check_names(forms, saved)
    for name, form in forms.items():
        _check_form(name, saved[name], form)
    return saved


def load_side_tensors(engine: TrainEngine, saved: Mapping[str, torch.Tensor]) -> None:
    """Restore `side_tensors` and `side_slices` in place.

    Raises:
        CheckpointError: the saved names, shapes or kinds of numbers are not the ones of this run.
    """
    live = side_tensors(engine) | side_slices(engine)
    _check_names(live, saved)
    for name, tensor in live.items():
        _check_form(name, saved[name], tensor)
    for name, tensor in live.items():
        tensor.copy_(saved[name])
    for clock in engine.clocks.values():
        clock.refresh()
    engine.seal_frozen()


def _check_names(live: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    if live.keys() != saved.keys():
        odd = sorted(live.keys() ^ saved.keys())
        raise CheckpointError(
            f"the checkpoint's method state differs from the run's, first at {odd[0]!r}: it "
            "was written with another method or precision; resume with the run file it names"
        )


def _check_form(name: str, saved: torch.Tensor, live: torch.Tensor) -> None:
    """Raise if torch would stretch or convert a saved tensor on its way into a live one."""
    if saved.shape != live.shape or saved.dtype != live.dtype:
        raise CheckpointError(
            f"the checkpoint's {name} is {saved.dtype} of shape {tuple(saved.shape)}, but the run "
            f"has {live.dtype} of shape {tuple(live.shape)}: it is damaged or of another run; use "
            "another checkpoint"
        )
