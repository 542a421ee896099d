"""GaLore (Zhao et al., arXiv 2403.03507), with gradients that are projected before they travel.

Between two refreshes the basis of every projection is fixed, so that Adam on the projected gradient
is Adam on one small factor: only that one's gradient is formed, reduced and kept. A refresh forms
the dense gradient of the coming batch once, hands it to one process per matrix, and gives everyone
the new basis. The weight then absorbs what the old one was moved by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from relora_ds.activity import doing
from relora_ds.config.methods.galore import GaLoreConfig
from relora_ds.methods.adapter import refuse_lost_edits
from relora_ds.methods.galore.basis import choice_bytes, leading_basis
from relora_ds.methods.galore.choice import BasisChoice
from relora_ds.methods.galore.layer import GaLoreLinear
from relora_ds.methods.interface import Event, Method, Session, projection_layers
from relora_ds.methods.train_state import TrainState
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.numerics.transfers import Stopwatch, read_together
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.shape import shard_of, tp_local_shape
from relora_ds.randomness import Stream

_logger = logging.getLogger(__name__)
_FP32 = 4


class GaLore(Method[GaLoreConfig]):
    """Every projection moves within a subspace that is chosen anew every `update_every` updates."""

    def linear(self, spec: LinearSpec) -> Projection:
        right = self.config.is_right(spec.out_features, spec.in_features)
        return GaLoreLinear(spec, self.config.rank, right)

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

    def event_bytes(self, model: nn.Module, micro_batches: int) -> int:
        layers = galore_layers(model).values()
        # the sums of gradients of this process's parts, which grow until the last micro-batch
        sums = sum(tp_local_shape(layer.weight).numel() for layer in layers)
        shapes = [(layer.spec.out_features, layer.spec.in_features) for layer in layers]
        config = self.config
        choice = max(
            _FP32 * m * n + choice_bytes(m, n, config.rank, config.svd, config.is_right(m, n))
            for m, n in shapes
        )
        return choice + (_FP32 * sums if micro_batches > 1 else 0)

    def start(self, state: TrainState, model: nn.Module) -> GaLoreSession:
        return GaLoreSession(self, state, model)


class GaLoreSession(Session[GaLore]):
    """Chooses the bases of a live engine."""

    def __init__(self, method: GaLore, state: TrainState, model: nn.Module) -> None:
        super().__init__(method, state, model)
        self._is_due = False
        """Whether a refresh is to be made up for: the batch that it needed was left out, or weights
        were not common to islands."""

    def before_step(self, step: int) -> Event | None:
        self._is_due |= step % self.method.config.update_every == 0
        if not self._is_due or not self.method.round_ending(step):
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
        choice = BasisChoice(layers, state.gradients, partial(self._leading_basis, step))
        if not choice.run():
            _logger.warning(
                "no refresh before step %d of the phase, whose batch is left out: the next one "
                "brings it",
                step + 1,
            )
            return None
        self._is_due = False
        watch.mark()
        before = state.probe()
        edits, rotations, kept = {}, {}, []
        values = state.weights.gather_in_turn(
            [[layer.projected, layer.basis] for layer in layers.values()]
        )
        for (name, layer), (projected, basis) in zip(layers.items(), values, strict=True):
            chosen = choice.chosen.pop(name)
            kept.append(chosen[0, 0].isnan())
            edits[name], rotations[layer.projected] = self._take(layer, projected, basis, chosen)
        if config.transport == "rotate" and state.moments.updates:
            state.moments.rotate(rotations)
        watch.mark()
        details = {
            "method/refreshes": float(step // config.update_every + 1),
            "method/refresh_bytes": float(state.bytes_moved - moved),
        }
        after = state.probe()
        figures = [*state.weights.totals(list(edits.values())).unbind(), torch.stack(kept).sum()]
        if before is not None and after is not None:
            figures.append((after - before).norm() / before.norm())
        found = read_together(figures)
        totals = {name: WeightEdit.of(sums) for name, sums in zip(edits, found, strict=False)}
        ((details["method/kept_bases"],), *rest) = found[len(edits) :]
        for (drift,) in rest:
            details["method/output_drift"] = drift
        refuse_lost_edits("refresh", totals, next(iter(layers.values())).weight.dtype)
        details["method/gradient_seconds"], details["method/refresh_seconds"] = watch.seconds()
        details["method/lost_update"] = max(
            (_ratio(edit.lost_sq, edit.intended_sq) for edit in totals.values()), default=0.0
        )
        drift = max((_ratio(e.error_sq, e.output_sq) for e in totals.values()), default=0.0)
        return Event("refresh", drift, 0.0, details)

    def _leading_basis(self, step: int, name: str, gradient: torch.Tensor) -> torch.Tensor:
        config = self.method.config
        stream = Stream(self.method.seed, "basis", name, step)
        return leading_basis(
            gradient, config.rank, config.svd, stream, config.is_right(*gradient.shape)
        )

    def _take(
        self, layer: GaLoreLinear, projected: torch.Tensor, basis: torch.Tensor, fresh: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """W takes up what P Q adds; then P is zero and Q is new.

        Whether a new basis was found is known on the device alone, so that a weight without one
        does the same with its old one.

        Args:
            projected: this rank's part of P.
            basis: this rank's part of Q.
            fresh: the new basis, whole; NaN to keep the old one.

        Returns:
            The figures of this rank's part of the edit, and C = Q_old Q_new^T.
        """
        weights, shard = self.state.weights, shard_of(layer.basis)
        # rounded first: moments are carried over to what the forward pass will compute with
        part = (fresh if shard is None else shard.part(fresh)).to(basis.dtype)
        keeps = fresh[0, 0].isnan()
        part = torch.where(keeps, basis, part)
        edit = weights.add_product(layer.weight, *layer.factors(projected, basis), 1.0)
        assert edit is not None
        rotation = basis.float() @ part.float().t()
        if shard is not None:
            rotation = weights.sum_over_rows(rotation)
        rotation = torch.where(keeps, torch.eye(layer.rank, device=part.device), rotation)
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


def _ratio(part_sq: float, whole_sq: float) -> float:
    return math.sqrt(part_sq / whole_sq) if whole_sq else 0.0
