"""What a line of the log says about switches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.train_state import Weights
from relora_ds.numerics.base_weight import WeightEdit
from relora_ds.numerics.transfers import upload
from relora_ds.parallel.shape import tp_local_shape
from relora_ds.randomness import Stream

_SKETCH = 64


@dataclass
class SwitchMetrics:
    """Counts since the start and since the last line."""

    switched: int = 0
    """Vectors replaced so far."""
    seconds: float = 0.0
    """Time of this process in events and in preparing them, since the last line."""
    bytes: int = 0
    """Payload of their collectives."""
    events: int = 0
    """Events since the last line."""
    _reset: float = 0.0
    _drift: float | None = None

    def note_switches(self, vectors: int, reset: float) -> None:
        """Count an event.

        Args:
            vectors: replaced, both factors together.
            reset: share of the adapters' moments that it set to zero.
        """
        self.switched += vectors
        self.events += 1
        self._reset += reset

    def note_edits(self, edits: Iterable[WeightEdit]) -> None:
        """Take the drift of a measured event into account."""
        drift = max(math.sqrt(e.error_sq / e.output_sq) if e.output_sq else 0.0 for e in edits)
        self._drift = max(self._drift or 0.0, drift)

    def read(self) -> dict[str, Any]:
        """Metrics by name; starts counting anew."""
        metrics: dict[str, Any] = {"method/switched_vectors": self.switched}
        if self.events:
            metrics |= {
                # of one event, on average
                "method/moments_reset_fraction": self._reset / self.events,
                "method/switch_seconds": self.seconds,
                "method/switch_bytes": self.bytes,
            }
        if self._drift is not None:
            metrics["method/function_drift"] = self._drift
        self.seconds, self.bytes = 0.0, 0
        self.events, self._reset, self._drift = 0, 0.0, None
        return metrics


class UpdateRank:
    """Effective rank of what training has added to one projection so far, by a random sketch.

    exp of the entropy of the normalised singular values (Roy and Vetterli, 2007) of the update
    times a fixed matrix of +-1 with 64 columns: at most 64, and a lower estimate when close to it.
    """

    ENTRY = "update_rank"

    def __init__(self, layer: AdapterLinear, seed: int) -> None:
        assert layer.spec.style == "column", "ranks hold whole rows"
        self.layer = layer.spec.name
        """Full name of the projection."""
        self.key = f"{layer.spec.name}.{self.ENTRY}"
        """Key of `reference` in a saved state."""
        self._layer = layer
        rows, cols = tp_local_shape(layer.weight)
        width = min(_SKETCH, cols)
        draw = Stream(seed, "sketch", layer.spec.name).words(0, cols * width)
        signs = ((draw & 1) * 2 - 1).float().view(cols, width)
        self._signs = signs.to(layer.lora_A.device)
        self.reference = torch.zeros(rows, width)
        """The projection times the sketch at the start, fp32."""

    def start(self, weights: Weights) -> None:
        """Count from here."""
        self.reference.copy_(self._product(weights))

    def measure(self, weights: Weights) -> float:
        """1 for an update of rank one, 0 for none."""
        update = (self._product(weights) - upload(self.reference, self._signs.device)).double()
        # through the Gram matrix, which the ranks that hold other rows can add to
        gram = weights.sum_over_rows(update.t() @ update)
        values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
        total = values.sum()
        share = values / total
        rank = torch.exp(-torch.xlogy(share, share).sum())
        return float(torch.where(total == 0.0, 0.0, rank))

    def _product(self, weights: Weights) -> torch.Tensor:
        layer = self._layer
        lora_a, lora_b = weights.gather([layer.lora_A, layer.lora_B])
        low_rank = lora_b.float() @ (lora_a.float() @ self._signs)
        return weights.times(layer.weight, self._signs).add_(low_rank, alpha=layer.scale)
