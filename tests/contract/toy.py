"""A method that nothing in the package knows: full-rank projections updated in a random subspace.

Its optimizer is matrix-wise and its moments do not have the parameters' shape: with a fixed random
basis P (m, k) per matrix, P^T G (k, n) is summed over the slices of G, a rank that owns the matrix
adds it to a momentum (k, n), and every rank moves its slice of W along P times it. Two further
states show the other two ways to hold one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from relora_ds.config.base import PositiveInt
from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.methods.catalogue import registered as registered_settings
from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.interface import Event, Method, Session
from relora_ds.methods.registry import registered as registered_method
from relora_ds.methods.train_state import TrainState
from relora_ds.model.init import EMBEDDING, HEAD
from relora_ds.optim.matrix import (
    Exchanged,
    MatrixOptimizer,
    MatrixUpdate,
    Needs,
    StateTensor,
    Steps,
    Sum,
)
from relora_ds.parallel.linear import Projection
from relora_ds.parallel.shape import global_shape
from relora_ds.randomness import Stream

BETA = 0.9


class ToySettings(MethodSettings):
    """Momentum in a random subspace of every projection."""

    name: Literal["toy"]
    """Registry key."""
    width: PositiveInt = 3
    """Dimension k of the subspace."""


@dataclass(frozen=True)
class SubspaceMomentum(MatrixOptimizer):
    """W -= lr * P M, M = beta M + P^T G."""

    needs: ClassVar[Needs] = "rows"

    width: int
    seed: int

    def state(self, shape: torch.Size) -> Mapping[str, StateTensor]:
        return {
            "momentum": StateTensor(torch.Size((self.width, shape[1])), "owner"),
            "travelled": StateTensor(torch.Size((1,)), "everyone"),
            "largest": StateTensor(shape, "slice"),
        }

    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        return Exchanged(sums=2 * self.width * sum(shape[1] for shape in shapes))

    def basis(self, name: str, rows: int) -> torch.Tensor:
        """P (m, k), orthogonal in expectation."""
        draw = Stream(self.seed, "toy.basis", name).uniform(0, rows * self.width)
        return (draw.view(rows, self.width) - 0.5) * (12.0 / rows) ** 0.5

    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        (update,) = matrices
        matrix, state = update.matrix, update.matrix.state
        rows, cols = matrix.shape
        basis = self.basis(matrix.name, rows)
        partial = torch.zeros(self.width, cols)
        for part in matrix.rectangles:
            own = basis[part.row : part.row + part.rows]
            partial[:, part.col : part.col + part.cols] += own.t() @ part.of(update.grad)
        torch.maximum(state["largest"], update.grad.abs(), out=state["largest"])
        total = yield Sum(partial)
        assert total is not None
        mine = torch.zeros_like(total)
        if matrix.owner:
            mine = state["momentum"].mul_(BETA).add_(total)
        momentum = yield Sum(mine)
        assert momentum is not None
        state["travelled"] += update.lr * momentum.norm()
        for part in matrix.rectangles:
            own = basis[part.row : part.row + part.rows]
            move = own @ momentum[:, part.col : part.col + part.cols]
            part.of(update.master).sub_(move, alpha=update.lr)


class Toy(Method[ToySettings]):
    """Full-rank training whose projections move in subspaces."""

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        if name in (EMBEDDING, HEAD) or len(global_shape(parameter)) != 2:
            return None
        return SubspaceMomentum(self.config.width, self.seed)

    def start(self, state: TrainState, model: nn.Module) -> ToySession:
        return ToySession(self, state, model)


class OpaqueToy(Toy):
    """Toy training by a method that has no dense equivalent to export."""

    has_dense_weight = False

    def dense_weight(self, layer: Projection) -> torch.Tensor | None:
        return None


class ToySession(Session[Toy]):
    """Reports an event now and then, so that processes are compared."""

    def after_step(self, step: int) -> Event | None:
        return Event("refresh", 0.0, 0.0) if step % 4 == 0 else None


@contextmanager
def toy(method: type[Toy] = Toy) -> Iterator[None]:
    """The method is registered within the block, as a package of its own would do it."""
    with ExitStack() as stack:
        stack.enter_context(registered_settings(ToySettings))
        stack.enter_context(registered_method("toy", method))
        yield
