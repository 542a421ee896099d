"""One optimizer for groups that are updated element by element and groups of matrices.

Each matrix of a group that is marked `matrix_wise` is updated by an optimizer of its own; any other
group is AdamW's. The engine says, once it knows the layout, where every matrix lies in the tensors
that the optimizer steps, which optimizer it has, and how ranks exchange what that one asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from relora_ds.numerics.transfers import upload
from relora_ds.optim.matrix import (
    MatrixExchange,
    MatrixOptimizer,
    MatrixSlice,
    MatrixUpdate,
    drive,
    units_of,
)
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment


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
    `exchange` is how ranks share what they hold; `refresh` takes the masters of matrices, by full
    name, over into the model. They are None until the engine knows them.
    """

    matrices: dict[int, list[PlacedMatrix]] | None = None
    exchange: MatrixExchange | None = None
    refresh: Callable[[Sequence[str]], None] | None = None

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._waiting: dict[str, tuple[torch.Tensor, MatrixOptimizer, MatrixUpdate]] = {}
        """Updates of matrices whose unit is not complete yet."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient.

        Matrices that have one optimizer are updated together. Ranks step the same groups in the
        same order, also where their slices are empty. A group that is stepped alone may hold one
        factor of pairs only: this one waits for the step of the other's group.
        """
        assert closure is None, "a closure would run between ZeRO's reduction and the update"
        waited = list(self._waiting)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if group.get("matrix_wise"):
                    self._collect(p, group)
                else:
                    self.update(p, group)
        self._update_complete()
        # whoever stepped their group took their masters over before they were updated
        late = [name for name in waited if name not in self._waiting]
        if late and self.refresh is not None:
            self.refresh(late)

    def state_forms(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the state of a tensor holds beside its `step`: none where matrices lie in it."""
        return {} if storage_key(p) in (self.matrices or {}) else super().state_forms(p)

    def update_early(
        self, p: torch.Tensor, group: dict[str, Any], scale: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """One update of a tensor within the backward pass.

        The first factor of a pair waits for the gradient of the second one and keeps its own.

        Args:
            p: has a gradient.
            group: its group.
            scale: fp32 scalar that the gradient is multiplied by.

        Returns:
            What was updated: nothing, the tensor, or both factors.
        """
        if not group.get("matrix_wise"):
            return super().update_early(p, group, scale)
        if scale is not None:
            assert p.grad is not None
            p.grad.mul_(scale)
        self._collect(p, group)
        return self._update_complete()

    def _collect(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        for rule, update in self._matrices_in(p, group):
            assert update.matrix.name not in self._waiting, "the last update was not complete"
            self._waiting[update.matrix.name] = p, rule, update

    def _update_complete(self) -> list[torch.Tensor]:
        """Update all units that are complete, side by side; returns the tensors they lie in."""
        running, stepped = [], []
        for unit in units_of(self._due_rules()):
            if any(name not in self._waiting for name in unit):
                continue
            parts = [self._waiting.pop(name) for name in unit]
            updates = [update for _, _, update in parts]
            running.append(([each.matrix for each in updates], parts[0][1].update(updates)))
            stepped += [p for p, _, _ in parts]
        if self.exchange is not None:
            drive(running, self.exchange)
        return stepped

    def _due_rules(self) -> dict[str, MatrixOptimizer]:
        """Every matrix, due or not, whose optimizer has something to do, in the groups' order."""
        placed = chain.from_iterable((self.matrices or {}).values())
        due = {rule for _, rule, _ in self._waiting.values()}
        return {each.matrix.name: each.rule for each in placed if each.rule in due}

    def _matrices_in(
        self, p: torch.Tensor, group: dict[str, Any]
    ) -> Iterator[tuple[MatrixOptimizer, MatrixUpdate]]:
        """The updates of the matrices that lie in a tensor."""
        if self.matrices is None:
            return  # DeepSpeed's bf16 wrapper steps once, on zero gradients, before there are any
        state, key = self.state[p], storage_key(p)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        completed = int(state["step"])
        state["step"] += 1
        assert p.grad is not None
        flat, grad = p.view(-1), p.grad.view(-1)
        clocked = {} if self.fragments is None else {f.offset: f for f in self.fragments[key]}
        for placed in self.matrices[key]:
            place = slice(placed.offset, placed.offset + placed.matrix.elements)
            # an empty slice lies where the next one begins
            fragment = clocked.get(placed.offset) if placed.matrix.elements else None
            frozen = _frozen(fragment, completed, flat.device)
            update = MatrixUpdate(
                placed.matrix,
                flat[place],
                grad[place],
                completed + 1,
                group["lr"],
                group["weight_decay"],
                frozen,
            )
            yield placed.rule, update


def _frozen(fragment: Fragment | None, completed: int, device: torch.device) -> torch.Tensor | None:
    """Elements of a clocked stretch that the update after `completed` ones does not train, bool,
    1-D; None where it trains all of them."""
    if fragment is None or not fragment.length:
        return None
    live = fragment.clock.live(completed)
    if bool(live.all()):  # of the host
        return None
    still = upload(~live, device)
    mask = torch.empty(fragment.length, dtype=torch.bool, device=device)
    for block in replace(fragment, offset=0).blocks(mask):
        block.view.copy_(block.along(still, fragment.clock.axis).expand_as(block.view))
    return mask
