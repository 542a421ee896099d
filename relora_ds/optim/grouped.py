"""One optimizer for groups that are updated element by element and groups of matrices.

Each matrix of a group that is marked `matrix_wise` is updated by an optimizer of its own; any other
group is AdamW's. The engine says, once it knows the layout, where every matrix lies in the tensors
that the optimizer steps, which optimizer it has, and how ranks exchange what that one asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from relora_ds.optim.matrix import (
    MatrixExchange,
    MatrixOptimizer,
    MatrixSlice,
    MatrixUpdate,
    drive,
    units_of,
)
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key


@dataclass(frozen=True)
class PlacedMatrix:
    """A matrix's slice within a tensor that the optimizer steps."""

    matrix: MatrixSlice
    rule: MatrixOptimizer
    """Updates it."""
    offset: int
    """Index of its first element in the flattened tensor."""


class GroupedOptimizer(VectorAdamW):
    """AdamW with exact bias correction per vector, and matrix-wise updates of some groups.

    `matrices` maps the storage of each tensor of a matrix-wise group to what lies in it, in order;
    `exchange` is how ranks share what they hold. Both are None until the engine knows them.
    """

    matrices: dict[int, list[PlacedMatrix]] | None = None
    exchange: MatrixExchange | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient.

        Matrices that have one optimizer are updated together. Ranks step the same groups in the
        same order, also where their slices are empty.
        """
        assert closure is None, "a closure would run between ZeRO's reduction and the update"
        updates: dict[str, MatrixUpdate] = {}
        rules: dict[str, MatrixOptimizer] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not group.get("matrix_wise"):
                    self.update(p, group)
                    continue
                for rule, update in self._matrices_in(p, group):
                    updates[update.matrix.name], rules[update.matrix.name] = update, rule
        running = []
        for names in units_of(rules):
            unit = [updates[name] for name in names]
            running.append(([each.matrix for each in unit], rules[names[0]].update(unit)))
        if self.exchange is not None:
            drive(running, self.exchange)

    def _matrices_in(
        self, p: torch.Tensor, group: dict[str, Any]
    ) -> Iterator[tuple[MatrixOptimizer, MatrixUpdate]]:
        """The updates of the matrices that lie in a tensor."""
        if self.matrices is None:
            return  # DeepSpeed's bf16 wrapper steps once, on zero gradients, before there are any
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        assert p.grad is not None
        flat, grad, step = p.view(-1), p.grad.view(-1), int(state["step"])
        for placed in self.matrices[storage_key(p)]:
            place = slice(placed.offset, placed.offset + placed.matrix.elements)
            update = MatrixUpdate(
                placed.matrix, flat[place], grad[place], step, group["lr"], group["weight_decay"]
            )
            yield placed.rule, update
