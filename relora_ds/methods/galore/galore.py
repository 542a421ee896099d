"""GaLore (Zhao et al., arXiv 2403.03507), with gradients that are projected before they travel.

Between two refreshes the basis of every projection is fixed, so that Adam on the projected gradient
is Adam on one small factor: only that one's gradient is formed, reduced and kept. A refresh forms
the dense gradient of the coming batch once, hands it to one process per matrix, and gives everyone
the new basis. The weight then absorbs what the old one was moved by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from relora_ds.activity import doing
from relora_ds.config.methods.galore import GaLoreConfig
from relora_ds.methods.adapter import refuse_lost_edits
from relora_ds.methods.galore.basis import leading_basis
from relora_ds.methods.galore.layer import GaLoreLinear, Sink
from relora_ds.methods.interface import Event, Method, Session, projection_layers
from relora_ds.methods.train_state import TrainState
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.numerics.transfers import Stopwatch, read_together
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.shape import shard_of, tp_local_shape
from relora_ds.randomness import Stream

_logger = logging.getLogger(__name__)


class GaLore(Method[GaLoreConfig]):
    """Every projection moves within a subspace that is chosen anew every `update_every` updates."""

    def linear(self, spec: LinearSpec) -> Projection:
        return GaLoreLinear(spec, self.config.rank)

    def initialize(self, layer: Projection, dense: torch.Tensor) -> None:
        assert isinstance(layer, GaLoreLinear)
        layer.weight.copy_(dense)
        layer.projected.zero_()
        layer.basis.copy_(torch.eye(*layer.basis.shape, device=dense.device))

    def dense_weight(self, layer: Projection) -> torch.Tensor:
        assert isinstance(layer, GaLoreLinear)
        left, right = layer.factors(layer.projected.float(), layer.basis.float())
        return layer.weight.float() + left @ right

    def edited_weights(self, model: nn.Module) -> list[nn.Parameter]:
        return [layer.weight for layer in galore_layers(model).values()]

    def start(self, state: TrainState, model: nn.Module) -> GaLoreSession:
        return GaLoreSession(self, state, model)


class GaLoreSession(Session[GaLore]):
    """Chooses the bases of a live engine."""

    def __init__(self, method: GaLore, state: TrainState, model: nn.Module) -> None:
        super().__init__(method, state, model)
        self._is_due = False
        """Whether a refresh is to be made up for: the batch that it needed was left out."""

    def before_step(self, step: int) -> Event | None:
        self._is_due |= step % self.method.config.update_every == 0
        if not self._is_due:
            return None
        with doing("refresh"):
            self.state.before_event("refresh", f"{step} {self.state.moments.updates}".encode())
            return self._refresh(step)

    def state_dict(self) -> dict[str, Any]:
        return {"is_due": self._is_due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._is_due = bool(state["is_due"])

    def _refresh(self, step: int) -> Event | None:
        """Choose every basis from the gradient of the batch that update `step` + 1 takes."""
        state, config = self.state, self.method.config
        layers = galore_layers(self.model)
        watch, moved = Stopwatch(next(self.model.parameters()).device), state.bytes_moved
        with _dense_gradients(layers) as sums:
            count = state.gradients.run_batch()
        if not count:
            _logger.warning(
                "no refresh before step %d of the phase, whose batch is left out: the next one "
                "brings it",
                step + 1,
            )
            return None
        self._is_due = False
        watch.mark()
        before = state.probe()
        edits, rotations = {}, {}
        values = state.weights.gather_in_turn(
            [[layer.projected, layer.basis] for layer in layers.values()]
        )
        fresh = self._fresh_bases(layers, sums, count, step)
        for (name, layer), (projected, basis), chosen in zip(
            layers.items(), values, fresh, strict=True
        ):
            if chosen is None:  # known to all ranks alike
                continue
            edits[name], rotations[layer.projected] = self._take(layer, projected, basis, chosen)
        if config.transport == "rotate" and state.moments.updates:
            state.moments.rotate(rotations)
        watch.mark()
        details = {
            "method/refreshes": float(step // config.update_every + 1),
            "method/kept_bases": float(len(layers) - len(edits)),
            "method/refresh_bytes": float(state.bytes_moved - moved),
        }
        after = state.probe()
        figures = list(state.weights.totals(list(edits.values())).unbind()) if edits else []
        if before is not None and after is not None:
            figures.append((after - before).norm() / before.norm())
        found = read_together(figures) if figures else []
        totals = {name: WeightEdit.of(sums) for name, sums in zip(edits, found, strict=False)}
        for (drift,) in found[len(edits) :]:
            details["method/output_drift"] = drift
        refuse_lost_edits("refresh", totals, next(iter(layers.values())).weight.dtype)
        details["method/gradient_seconds"], details["method/refresh_seconds"] = watch.seconds()
        details["method/lost_update"] = max(
            (_ratio(edit.lost_sq, edit.intended_sq) for edit in totals.values()), default=0.0
        )
        drift = max((_ratio(e.error_sq, e.output_sq) for e in totals.values()), default=0.0)
        return Event("refresh", drift, 0.0, details)

    def _fresh_bases(
        self,
        layers: Mapping[str, GaLoreLinear],
        sums: dict[str, torch.Tensor],
        count: int,
        step: int,
    ) -> Iterator[torch.Tensor | None]:
        """The new basis of every projection, in order; None where its gradient has no direction.

        Processes take turns, and work on one matrix each at a time.

        Args:
            sums: dense gradients, summed over micro-batches; emptied.
            count: micro-batches.
        """
        state, config, names = self.state, self.method.config, list(layers)
        owners = state.gradients.owners
        for first in range(0, len(names), owners):
            owned: dict[int, tuple[str, torch.Tensor]] = {}
            found = []
            for turn, name in enumerate(names[first : first + owners]):
                layer, part = layers[name], sums.pop(name).div_(count)
                width = min(layer.spec.out_features, layer.spec.in_features)
                found.append(part.new_full((layer.rank, width), torch.nan))
                whole = state.gradients.mean(layer.weight, part, turn)
                if whole is not None:
                    owned[turn] = name, whole
            while owned:
                turn, (name, whole) = owned.popitem()
                stream = Stream(self.method.seed, "basis", name, step)
                basis = leading_basis(whole, config.rank, config.svd, stream)
                if basis is not None:
                    found[turn].copy_(basis)
            for turn, value in enumerate(found):
                state.gradients.spread(value, turn)
            # the host waits here, once for as many matrices as there are processes
            marks = torch.stack([value[0, 0] for value in found]).tolist()
            for value, mark in zip(found, marks, strict=True):
                yield None if math.isnan(mark) else value

    def _take(
        self, layer: GaLoreLinear, projected: torch.Tensor, basis: torch.Tensor, fresh: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """W takes up what P Q adds; then P is zero and Q is new.

        Args:
            projected: this rank's part of P.
            basis: this rank's part of Q.
            fresh: the new basis, whole.

        Returns:
            The figures of this rank's part of the edit, and C = Q_old Q_new^T.
        """
        weights, shard = self.state.weights, shard_of(layer.basis)
        # rounded first: moments are carried over to what the forward pass will compute with
        part = (fresh if shard is None else shard.part(fresh)).to(basis.dtype).contiguous()
        edit = weights.add_product(layer.weight, *layer.factors(projected, basis), 1.0)
        assert edit is not None
        rotation = basis.float() @ part.float().t()
        if shard is not None:
            rotation = weights.sum_over_rows(rotation)
        nothing = torch.zeros(tp_local_shape(layer.projected), device=part.device)
        weights.write(layer.projected, nothing)
        weights.write_frozen(layer.basis, part)
        return edit, rotation


def galore_layers(model: nn.Module) -> dict[str, GaLoreLinear]:
    """The projections of a model of which all are `GaLoreLinear`s, by full name, in order."""
    layers = {}
    for name, layer in projection_layers(model).items():
        assert isinstance(layer, GaLoreLinear)
        layers[name] = layer
    return layers


@contextmanager
def _dense_gradients(layers: Mapping[str, GaLoreLinear]) -> Iterator[dict[str, torch.Tensor]]:
    """Dense gradients of this rank's parts of weights, fp32, summed over the backward passes
    inside."""
    sums: dict[str, torch.Tensor] = {}

    def sink(name: str) -> Sink:
        def add(gradient: torch.Tensor) -> None:
            if name in sums:
                sums[name].add_(gradient)
            else:
                sums[name] = gradient.float()

        return add

    for name, layer in layers.items():
        layer.sink = sink(name)
    try:
        yield sums
    finally:
        for layer in layers.values():
            layer.sink = None


def _ratio(part_sq: float, whole_sq: float) -> float:
    return math.sqrt(part_sq / whole_sq) if whole_sq else 0.0
