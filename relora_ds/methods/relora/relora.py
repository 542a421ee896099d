"""ReLoRA (Lialin et al., arXiv 2307.05695): merge the adapters into W, restart them, repeat."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from relora_ds.activity import doing
from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.methods.adapter import (
    AdapterLinear,
    AdapterMethod,
    adapter_layers,
    draw_factors,
    refuse_lost_edits,
)
from relora_ds.methods.interface import Event, Product, Session
from relora_ds.methods.relora.pruning import reset_moments, reset_share
from relora_ds.methods.schedule import Schedule
from relora_ds.methods.train_state import TrainState
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.numerics.transfers import Stopwatch, read_together

_logger = logging.getLogger(__name__)


class ReLoRA(AdapterMethod[ReLoRAConfig]):
    """Restarts after every `merge_every` updates, with a jagged learning rate."""

    def lr_multiplier(self, step: int, schedule: Schedule) -> float:
        """The jagged schedule (section 3 of the paper; exact order as in the authors' scheduler).

        The first updates after a restart ramp from zero to the value that the schedule has at the
        end of the ramp. Where no merge happens in the final decay, there is no ramp either.
        """
        if step < schedule.warmup_steps:
            return schedule(step)
        every, ramp = self.config.merge_every, self.config.restart_warmup_steps
        shifted = step + self.config.adjust_step
        cycle, position = divmod(shifted, every)
        if step >= every and position < ramp and self._may_merge(cycle * every):
            return position / ramp * schedule.decay(cycle * every + ramp)
        return schedule.decay(shifted)

    def edited_weights(self, model: nn.Module) -> list[nn.Parameter]:
        return [layer.weight for layer in adapter_layers(model).values()]

    def vector_axes(self, model: nn.Module) -> dict[nn.Parameter, int]:
        if not self.config.reset.steps:
            return {}
        axes = {}
        for layer in adapter_layers(model).values():
            axes[layer.lora_A], axes[layer.lora_B] = 0, 1
            if layer.scaling is not None:
                axes[layer.scaling] = 0
        return axes

    def is_merge_step(self, step: int) -> bool:
        """Whether a merge follows update number `step`; never after the last one."""
        due = 0 < step < self.steps and step % self.config.merge_every == 0
        return due and self._may_merge(step)

    def _may_merge(self, step: int) -> bool:
        """Whether the learning rate leaves room for a merge: before its final decay, by default."""
        return self.config.merge_in_decay or self.stable_steps is None or step < self.stable_steps

    def start(self, state: TrainState, model: nn.Module) -> ReLoRASession:
        return ReLoRASession(self, state, model)


class ReLoRASession(Session[ReLoRA]):
    """Merges and restarts on a live engine."""

    def __init__(self, method: ReLoRA, state: TrainState, model: nn.Module) -> None:
        super().__init__(method, state, model)
        self._merged_at: int | None = 0
        """Updates that had been applied at the last merge; None where a checkpoint of an earlier
        version does not say."""

    def before_step(self, step: int) -> Event | None:
        # a run never merges after its last step, so one that goes on longer has that to make up for
        known = self._merged_at is not None and self._merged_at != self.state.moments.updates
        return self.after_step(step) if known and self.method.is_merge_step(step) else None

    def after_step(self, step: int) -> Event | None:
        if not self.method.is_merge_step(step):
            return None
        with doing("merge"):
            updates = self.state.moments.updates
            self.state.before_event("merge", f"{step} {updates} {self._merged_at}".encode())
            if updates == self._merged_at:
                _logger.warning(
                    "no merge after step %d of the phase: none of the updates since the last one "
                    "was applied, so there is nothing to merge or to reset",
                    step,
                )
                return None
            self._merged_at = updates
            return self._merge(step)

    def products_to_merge(self, step: int) -> list[Product]:
        if not self.method.is_merge_step(step):
            return []
        layers = adapter_layers(self.model).values()
        return [
            Product(layer.weight, tuple(_own_parameters(layer)), layer.merge_scale)
            for layer in layers
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"merged_at": self._merged_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # where it is not known some update was applied: a run went on only if all were
        self._merged_at = state.get("merged_at")

    def _merge(self, step: int) -> Event:
        """Merge and restart every adapter, after `step` updates.

        Everything is queued first. What the event reports, and what would make it a failed one, is
        read at the end, in one copy: the host waits for the device once, for any number of
        projections.
        """
        state, config = self.state, self.method.config
        number = step // config.merge_every
        layers = adapter_layers(self.model)
        before = state.probe()
        watch, moved = Stopwatch(next(self.model.parameters()).device), state.bytes_moved
        factors = state.weights.gather_in_turn(
            [_own_parameters(layer) for layer in layers.values()]
        )
        parts = [
            self._restart(layer, number, values)
            for layer, values in zip(layers.values(), factors, strict=True)
        ]
        figures = list(state.weights.totals(parts).unbind())
        watch.mark()
        merged = state.bytes_moved
        figures.append(self._reset_optimizer(layers, number))
        watch.mark()
        reset = state.bytes_moved
        after = state.probe()
        if before is not None and after is not None:
            figures.append((after - before).norm() / before.norm())
        found = read_together(figures)
        edits = {name: WeightEdit.of(sums) for name, sums in zip(layers, found, strict=False)}
        counts, *output_drift = found[len(layers) :]
        refuse_lost_edits("merge", edits, next(iter(layers.values())).weight.dtype)
        fraction = reset_share(int(counts[0]), int(counts[1]), config.reset)
        merge_seconds, reset_seconds = watch.seconds()
        details = {
            "method/merges": float(number),
            "method/lost_update": max(_ratio(e.lost_sq, e.intended_sq) for e in edits.values()),
            "method/merge_seconds": merge_seconds,
            "method/merge_bytes": float(merged - moved),
            "method/reset_seconds": reset_seconds,
            "method/reset_bytes": float(reset - merged),
        }
        if output_drift:
            details["method/output_drift"] = output_drift[0][0]
        drift = max(_ratio(edit.error_sq, edit.output_sq) for edit in edits.values())
        return Event("merge", drift, fraction, details)

    def _restart(
        self, layer: AdapterLinear, number: int, values: list[torch.Tensor]
    ) -> torch.Tensor:
        """W += scale * B A, then fresh factors; what they add at once, W absorbs.

        Args:
            values: of `_own_parameters`, gathered.

        Returns:
            The figures of the edit of this rank's part, for `Weights.totals`.
        """
        weights, method, dtype = self.state.weights, self.method, layer.lora_A.dtype
        # rounded first, so that W absorbs exactly what the forward pass will compute with
        lora_a, lora_b = (
            f.to(dtype) for f in draw_factors(layer, method.config, method.seed, number)
        )
        left, right, *scaling = values
        scale = fresh_scale = layer.merge_scale(*scaling)
        if layer.scaling is not None:
            fresh = torch.ones_like(scaling[0])
            fresh_scale = layer.merge_scale(fresh)
            weights.write(layer.scaling, fresh)
        if method.config.init == "balanced":
            left = torch.cat([left.float() * scale, lora_b.float() * -fresh_scale], dim=1)
            right = torch.cat([right.float(), lora_a.float()])
            scale = 1.0
        sums = weights.add_product(layer.weight, left, right, scale)
        assert sums is not None
        weights.write(layer.lora_A, lora_a)
        weights.write(layer.lora_B, lora_b)
        return sums

    def _reset_optimizer(self, layers: dict[str, AdapterLinear], number: int) -> torch.Tensor:
        """Returns the counts of `reset_moments`."""
        state, reset = self.state, self.method.config.reset
        factors: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
            if layer.scaling is not None:
                factors[f"{name}.scaling"] = layer.scaling
        counts = reset_moments(
            state.moments, state.weights, factors, reset, self.method.seed, number
        )
        if reset.steps:
            for parameter in factors.values():
                state.moments.restart(parameter)
        return counts


def _own_parameters(layer: AdapterLinear) -> list[nn.Parameter]:
    return [layer.lora_B, layer.lora_A] + ([] if layer.scaling is None else [layer.scaling])


def _ratio(part_sq: float, whole_sq: float) -> float:
    return math.sqrt(part_sq / whole_sq) if whole_sq else 0.0
