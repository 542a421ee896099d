"""Bytes of a training step by component: the words of both the meter and the closed form."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that one process takes up."""

    weights: int
    """Working weights, and what is stored beside those that are edited."""
    indices: int
    """Buffers of the model."""
    gradients: int
    """The most between the last backward pass and the end of the update."""
    states: int
    """Optimizer moments, and masters of trained weights."""
    activations: int
    """What autograd keeps of one micro-batch."""
    transient: int | None = None
    """What lives for one product or one step; None where it cannot be measured, on a host."""

    @property
    def total(self) -> int:
        """Bytes of everything that is known."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Bytes by name of the component, without those that are not known."""
        return {name: size for name, size in asdict(self).items() if size is not None}
