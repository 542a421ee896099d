"""AdamW whose moments are stored in eight bits, on whole parameters or any flat cut of them.

The arithmetic is `VectorAdamW`'s in fp32, a stretch at a time, so that no more than a few megabytes
of decoded moments exist at once. Blocks are counted from the start of each tensor that the
optimizer steps, so their borders depend on how ZeRO cuts it: another stage or number of processes
is the same run up to the rounding of codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from relora_ds.engine.block_codes import BLOCK, Codes
from relora_ds.engine.vector_adamw import VectorAdamW, advance
from relora_ds.engine.vector_clock import Fragment

_STRETCH = 1 << 20  # elements decoded at once, a multiple of the block
_TYPES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}


class BlockAdamW(VectorAdamW):
    """State per tensor: `exp_avg` (int8) and `exp_avg_sq` (uint8, of the root) in the tensor's
    shape, `*_scale` (fp32, one per block), and one scalar `step`."""

    def _update(
        self, p: torch.Tensor, grad: torch.Tensor, fragments: list[Fragment], group: dict[str, Any]
    ) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the host: reading never syncs
            for name, kind in _TYPES.items():
                blocks = -(-p.numel() // BLOCK)
                state[name] = torch.zeros_like(p, dtype=kind)
                state[f"{name}_scale"] = torch.zeros(blocks, device=p.device)
        completed = int(state["step"])
        state["step"] += 1
        flat, flat_grad = p.view(-1), grad.view(-1)
        for start in range(0, flat.numel(), _STRETCH):
            stop = min(flat.numel(), start + _STRETCH)
            first, second = (self._codes(state, name, start, stop) for name in _TYPES)
            moments = first.load(), second.load().square_()
            inner = _within(fragments, start, stop)
            advance(flat[start:stop], flat_grad[start:stop], moments, inner, completed, group)
            first.store(moments[0])
            second.store(moments[1].sqrt_())

    @staticmethod
    def _codes(state: dict[str, torch.Tensor], name: str, start: int, stop: int) -> Codes:
        scales = state[f"{name}_scale"][start // BLOCK : -(-stop // BLOCK)]
        return Codes(state[name].view(-1)[start:stop], scales)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restore a state; torch casts whatever it finds to the parameter's type on the way."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name, kind in _TYPES.items():
                if name in state:
                    state[name] = state[name].to(kind)


def _within(fragments: list[Fragment], start: int, stop: int) -> list[Fragment]:
    """The parts of fragments that lie in [start, stop), in its own coordinates."""
    parts = []
    for fragment in fragments:
        low, high = max(fragment.offset, start), min(fragment.end, stop)
        if low < high:
            first = fragment.start + low - fragment.offset
            parts.append(replace(fragment, start=first, offset=low - start, length=high - low))
    return parts
