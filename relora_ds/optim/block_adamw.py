"""AdamW whose moments are stored in eight bits, on whole parameters or any flat cut of them.

The arithmetic is `VectorAdamW`'s in fp32, a stretch at a time, so that no more than a few megabytes
of decoded moments exist at once. Blocks are counted from the start of each tensor that the
optimizer steps, so their borders depend on how ZeRO cuts it: another stage or number of processes
is the same run up to the rounding of codes.
"""

from __future__ import annotations

import torch

from relora_ds.numerics.codes.block_codes import BLOCK, Codes, take_roots
from relora_ds.optim.vector_adamw import Moments, VectorAdamW, cached_stretch

_TYPES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}


class BlockAdamW(VectorAdamW):
    """State per tensor: `exp_avg` (int8) and `exp_avg_sq` (uint8, of the root) in the tensor's
    shape, `*_scale` (fp32, one per block), and one scalar `step`."""

    def _stretch(self, p: torch.Tensor) -> int:
        return cached_stretch(p)

    def _first_moments(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = -(-p.numel() // BLOCK)
        codes = {name: torch.zeros_like(p, dtype=kind) for name, kind in _TYPES.items()}
        scales = {f"{name}_scale": torch.zeros(blocks, device=p.device) for name in _TYPES}
        return codes | scales

    def _load(self, state: dict[str, torch.Tensor], start: int, stop: int) -> Moments:
        first, second = (_codes(state, name, start, stop).load() for name in _TYPES)
        return first, second.square_()

    def _store(
        self, state: dict[str, torch.Tensor], start: int, stop: int, moments: Moments
    ) -> None:
        for name, values in zip(_TYPES, (moments[0], take_roots(moments[1])), strict=True):
            _codes(state, name, start, stop).store(values)


def _codes(state: dict[str, torch.Tensor], name: str, start: int, stop: int) -> Codes:
    scales = state[f"{name}_scale"][start // BLOCK : -(-stop // BLOCK)]
    return Codes(state[name].view(-1)[start:stop], scales)
