"""Exact values into and out of an engine, where one phase of a run hands the model to the next."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from relora_ds.engine.deepspeed.partition import DenseSlices
from relora_ds.engine.engine import TrainEngine
from relora_ds.parallel.shape import shard_of


@torch.no_grad()
def exact_parameters(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Every parameter at the precision it is kept, fp32 on the CPU, the same on every
    data-parallel rank; of what tensor parallelism cuts, this rank's part.

    Masters are put together from the ranks' slices, one parameter at a time: a transition
    between phases may gather, a merge never does.
    """
    values = {}
    for name, parameter in engine.model.named_parameters():
        if parameter in engine.layout.placements:
            exact = engine.layout.full_master(parameter)
        elif parameter in engine.bases:
            exact = engine.bases[parameter].load(parameter.data.view(-1), 0)
        else:
            exact = parameter.detach().float()
        values[name] = exact.view(parameter.shape).cpu()
    return values


@torch.no_grad()
def restore_masters(engine: TrainEngine, values: Mapping[str, torch.Tensor]) -> None:
    """Give masters the bits that the cast to the working precision took, where `values` has
    them: a master starts as a copy of the working weight.

    Args:
        values: uncut.
    """
    for name, parameter in engine.model.named_parameters():
        if name in values and parameter in engine.layout.placements:
            shard, value = shard_of(parameter), values[name].to(engine.device)
            seen = value if shard is None or shard.inner else shard.part(value)
            engine.state.weights.write(parameter, seen)


@torch.no_grad()
def exact_slices(engine: TrainEngine) -> DenseSlices | None:
    """This rank's slices of every parameter at the precision it is kept; None where a rank
    holds all of the working weights. No communication."""
    if not engine.layout.weights_sharded:
        return None
    values = {}
    for name, parameter in engine.model.named_parameters():
        _, working = engine.layout.working(parameter)
        if parameter in engine.layout.placements:
            working = engine.layout.placements[parameter].master()
        elif parameter in engine.bases:
            working = engine.bases[parameter].load(working, 0)
        # a copy: a view would keep the whole flat tensor alive
        values[name] = working.to("cpu", torch.float32, copy=True)
    return DenseSlices(values)
