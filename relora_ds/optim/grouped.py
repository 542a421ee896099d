"""One optimizer for groups that are updated element by element and groups of matrices.

A group with a `rule` is updated by the matrix-wise optimizer of that name, all of its matrices
together; any other group is AdamW's. The engine says, once it knows the layout, where every matrix
lies in the tensors that the optimizer steps, and how ranks exchange sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from relora_ds.optim.matrix import MatrixExchange, MatrixOptimizer, MatrixSlice, MatrixUpdate, drive
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key


@dataclass(frozen=True)
class PlacedMatrix:
    """A matrix's slice within a tensor that the optimizer steps."""

    matrix: MatrixSlice
    offset: int
    """Index of its first element in the flattened tensor."""


class GroupedOptimizer(VectorAdamW):
    """AdamW with exact bias correction per vector, and matrix-wise updates of some groups.

    `matrices` maps the storage of each tensor of a matrix-wise group to what lies in it, in order;
    `exchange` is how ranks share sums. Both are None until the engine knows them.

    Args:
        params: parameter groups; the value of `rule`, where there is one, is a key of `rules`.
        rules: matrix-wise optimizers by name.
        settings: of AdamW.
    """

    def __init__(
        self, params: Iterable[Any], rules: Mapping[str, MatrixOptimizer], **settings: Any
    ) -> None:
        super().__init__(params, **settings)
        self.rules = rules
        self.matrices: dict[int, list[PlacedMatrix]] | None = None
        self.exchange: MatrixExchange | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient.

        The matrices of one group are updated together. Ranks step the same groups in the same
        order, also where their slices are empty.
        """
        assert closure is None, "a closure would run between ZeRO's reduction and the update"
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            if group.get("rule") is None:
                for p in stepped:
                    self.update(p, group)
            elif stepped:
                self._update_matrices(self.rules[group["rule"]], stepped, group)

    def _update_matrices(
        self, rule: MatrixOptimizer, tensors: Sequence[torch.Tensor], group: dict[str, Any]
    ) -> None:
        if self.matrices is None or self.exchange is None:
            return  # DeepSpeed's bf16 wrapper steps once, on zero gradients, before there is one
        updates: dict[str, MatrixUpdate] = {}
        for p in tensors:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            state["step"] += 1
            assert p.grad is not None
            flat, grad = p.view(-1), p.grad.view(-1)
            for placed in self.matrices[storage_key(p)]:
                place = slice(placed.offset, placed.offset + placed.matrix.elements)
                updates[placed.matrix.name] = MatrixUpdate(
                    placed.matrix,
                    flat[place],
                    grad[place],
                    int(state["step"]),
                    group["lr"],
                    group["weight_decay"],
                )
        units = [[updates[name] for name in unit] for unit in rule.units(list(updates))]
        drive([(unit[0].matrix, rule.update(unit)) for unit in units], self.exchange)
