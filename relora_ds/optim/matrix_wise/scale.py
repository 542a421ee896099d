"""SCALE: gradients normalised by column, momentum in the last layer only (arXiv 2506.16659)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from relora_ds.optim.matrix import (
    Exchanged,
    MatrixOptimizer,
    MatrixUpdate,
    Needs,
    StateTensor,
    Steps,
    Sum,
)
from relora_ds.optim.rectangles import Rectangle

_EPS = 1e-8


@dataclass(frozen=True)
class Scale(MatrixOptimizer):
    """W -= lr D / rms(D), where D is the gradient or its momentum M = mu M + (1 - mu) G.

    Each output's weights are divided by their root mean square over the inputs. Of an embedding,
    whose rows are the inputs, it is the mean over the rows. Decay is decoupled: W is multiplied by
    1 - lr wd first. There is no state without momentum.
    """

    needs: ClassVar[Needs] = "rows"

    axis: Literal[0, 1] = 1
    """Dimension of the weight that the mean runs over; 0 for an embedding."""
    momentum: float | None = None
    """mu; None to use the gradient as it is."""

    def state(self, shape: torch.Size) -> Mapping[str, StateTensor]:
        return {} if self.momentum is None else {"momentum": StateTensor(shape, "slice")}

    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        return Exchanged(sums=sum(shape[1 - self.axis] for shape in shapes))

    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        (update,) = matrices
        matrix, direction = update.matrix, update.grad
        if self.momentum is not None:
            direction = matrix.state["momentum"].lerp_(update.grad, 1 - self.momentum)
        squares = direction.new_zeros(matrix.shape[1 - self.axis])
        for part in matrix.rectangles:
            squares[self._kept(part)] += part.of(direction).square().sum(self.axis)
        total = yield Sum(squares)
        roots = (total / matrix.shape[self.axis]).sqrt_().add_(_EPS)
        update.master.mul_(1 - update.lr * update.weight_decay)
        for part in matrix.rectangles:
            divisor = roots[self._kept(part)].unsqueeze(self.axis)
            part.of(update.master).addcdiv_(part.of(direction), divisor, value=-update.lr)

    def _kept(self, part: Rectangle) -> slice:
        """A rectangle's place along the dimension that no mean runs over."""
        first, length = (part.row, part.rows) if self.axis == 1 else (part.col, part.cols)
        return slice(first, first + length)
