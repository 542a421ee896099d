"""Gradients that islands average before every update: data parallelism in two levels.

DeepSpeed has averaged them over the copies of the model within an island and cut them. What is left
to move between islands is this rank's slices; clipping and the update come afterwards, so that all
islands take the same step.
"""

from __future__ import annotations

import torch

from relora_ds.engine.zero.layout import Layout
from relora_ds.parallel.islands import Islands


class IslandGradients:
    """The mean over islands of what this rank holds of the gradients.

    Args:
        layout: where its slices are.
        islands: who meets.
        device: where collectives take their tensors.
    """

    def __init__(self, layout: Layout, islands: Islands, device: torch.device) -> None:
        self._layout, self._islands, self._device = layout, islands, device

    @torch.no_grad()
    def average(self) -> None:
        """Average them in one collective per type of number; call between the last backward pass
        of an update and the update."""
        if self._islands.size == 1:
            return
        self._layout.await_gradients()
        pieces = [each for p in self._layout.placements for each in self._layout.gradient(p)]
        for dtype in dict.fromkeys(piece.dtype for piece in pieces):
            alike = [piece for piece in pieces if piece.dtype == dtype]
            # offloaded slices are on the host, where no collective of the devices reaches them
            flat = torch.cat([piece.reshape(-1) for piece in alike]).to(self._device)
            means = self._islands.mean(flat).split([piece.numel() for piece in alike])
            for piece, mean in zip(alike, means, strict=True):
                piece.copy_(mean.view(piece.shape))
