"""Is everything that a run would save finite? One fused reduction, and names if it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from relora_ds.engine.distributed import gather_objects
from relora_ds.engine.zero.layout import Layout
from relora_ds.engine.zero.matrices import ZeroMatrices
from relora_ds.numerics.base_weight import BaseWeight
from relora_ds.optim.vector_adamw import MOMENTS

_LISTED = 4  # names in a message


class FiniteCheck:
    """The check for one engine.

    Masters, moments, frozen weights and what is kept beside them are looked at; a rank looks at its
    own slices.

    Args:
        names: every parameter of the model by name.
        layout: where they, their masters and moments are.
        bases: what lies beside the edited ones.
        matrices: state of what is updated matrix-wise.
    """

    def __init__(
        self,
        names: Mapping[str, nn.Parameter],
        layout: Layout,
        bases: Mapping[nn.Parameter, BaseWeight],
        matrices: ZeroMatrices,
    ) -> None:
        self._names, self._layout, self._bases, self._matrices = names, layout, bases, matrices

    @torch.no_grad()
    def problem(self) -> str | None:
        """What is not finite, with the ranks that found it; None if everything is finite.

        A collective call that waits for the device; the answer is the same on every rank.
        """
        held = {name: tensor for name, tensor in self._held() if tensor.numel()}
        # squares take a tenth of the time that the largest value does, on a host; those of huge
        # numbers are not finite either, so that the numbers themselves decide
        extent = get_total_norm(list(held.values()), norm_type=2.0)
        if is_finite_everywhere(extent.to(self._device())):
            return None
        own = [name for name, tensor in held.items() if not bool(torch.isfinite(tensor).all())]
        found = gather_objects(own)
        return _describe(found) if any(found) else None

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every floating-point tensor of the state on this rank, by name; views, not copies."""
        for name, parameter in self._names.items():
            if parameter in self._layout.placements:
                yield name, self._layout.placements[parameter].master()
                for key in MOMENTS:
                    moment = self._layout.optimizer_state(parameter, key)
                    if moment is not None and moment.is_floating_point():
                        yield f"{name} ({key})", moment
            else:
                yield name, self._layout.working(parameter)[1]
            if parameter in self._bases:
                for key, tensor in self._bases[parameter].tensors().items():
                    if tensor.is_floating_point():
                        yield f"{name} ({key})", tensor
        for name, tensor in {
            **self._matrices.side_tensors(),
            **self._matrices.side_slices(),
        }.items():
            if tensor.is_floating_point():
                yield name, tensor

    def _device(self) -> torch.device:
        return next(iter(self._names.values())).device


def is_finite_everywhere(values: torch.Tensor) -> bool:
    """Whether the values are finite on every rank; the answer is the same on each.

    A collective call that waits for the device.

    Args:
        values: of any shape, where collectives take their tensors; they may differ by rank.
    """
    found = (~torch.isfinite(values).all()).to(torch.int32)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return not int(found)


def _describe(by_rank: list[list[str]]) -> str:
    """The first tensors that are not finite, each with its ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, names in enumerate(by_rank):
        for name in names:
            ranks.setdefault(name, []).append(rank)
    listed = [
        f"{name} (rank {', '.join(map(str, where))})" for name, where in [*ranks.items()][:_LISTED]
    ]
    more = len(ranks) - len(listed)
    return "; ".join(listed) + (f" and {more} more" if more > 0 else "")
