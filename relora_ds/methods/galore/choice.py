"""The bases that one batch's dense gradients choose, matrix by matrix as gradients are formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from relora_ds.methods.dense_gradients import Gradients
from relora_ds.methods.galore.layer import GaLoreLinear

Choose = Callable[[str, torch.Tensor], torch.Tensor]
"""From a projection's name and its whole gradient (m, n), fp32, to its basis."""


class BasisChoice:
    """Collects gradients of the passes over a batch, and has their owners choose.

    A gradient is reduced to its owner during the last pass, as soon as it is complete. Processes
    take turns in owning one; when each has one, they choose side by side, and everyone gets the
    bases. So a process has one whole gradient at a time, and with a single micro-batch nothing else
    of a weight's size. With several ones it keeps its own sums of all gradients until the last
    pass.

    Args:
        layers: the projections by name.
        gradients: makes the passes.
        choose: called on the owner.
    """

    def __init__(
        self, layers: Mapping[str, GaLoreLinear], gradients: Gradients, choose: Choose
    ) -> None:
        self._layers, self._gradients, self._choose = layers, gradients, choose
        self._sums: dict[str, torch.Tensor] = {}
        self._passes, self._left = 0, 0
        self._round: list[str] = []
        """Projections whose gradients have owners that have not chosen yet."""
        self._owned: dict[str, torch.Tensor] = {}
        """The one of them that this process has."""
        self.chosen: dict[str, torch.Tensor] = {}
        """The basis of every projection, fp32, whole, on every process."""

    def run(self) -> bool:
        """Pass the coming update's batch through the model. A collective call.

        Returns:
            Whether there was a batch, and `chosen` is complete.
        """
        for name, layer in self._layers.items():
            layer.sink = partial(self._take, name)
        try:
            for left in self._gradients.passes():
                self._passes, self._left = self._passes + 1, left
        finally:
            for layer in self._layers.values():
                layer.sink = None
        self._end_round()
        assert not self._passes or self.chosen.keys() == self._layers.keys()
        return bool(self._passes)

    def _take(self, name: str, gradient: torch.Tensor) -> None:
        """Take this process's gradient of its part of a weight in one micro-batch."""
        total = self._sums.pop(name).add_(gradient) if name in self._sums else gradient.float()
        if self._left:
            self._sums[name] = total
            return
        whole = self._gradients.mean(
            self._layers[name].weight, total.div_(self._passes), len(self._round)
        )
        self._round.append(name)
        if whole is not None:
            self._owned[name] = whole
        if len(self._round) == self._gradients.owners:
            self._end_round()

    def _end_round(self) -> None:
        """Choose for the gradient that this process has, and tell everyone all bases."""
        own = {}
        while self._owned:
            name, whole = self._owned.popitem()
            own[name] = self._choose(name, whole)
        for turn, name in enumerate(self._round):
            layer = self._layers[name]
            along = layer.spec.in_features if layer.right else layer.spec.out_features
            shape = layer.rank, along
            value = own.get(name)
            if value is None:
                value = torch.empty(shape, dtype=torch.float32, device=layer.weight.device)
            self.chosen[name] = self._gradients.spread(value, turn)
        self._round = []
