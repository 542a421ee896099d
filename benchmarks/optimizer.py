"""Time of an update per weight: 32- and 8-bit moments, with fp32 masters and without. See --help.

Prints one JSON object: processor nanoseconds per weight, and ratios to 32-bit moments.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.randomness import Stream

_EXAMPLE = """
example:
  python benchmarks/optimizer.py --elements 8388608 --threads 1
"""
_WARM = 2  # the first repetitions compile kernels and allocate states


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--elements", type=int, default=1 << 23, help="of the parameter")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    print(json.dumps(benchmark_optimizer(parsed.elements, parsed.repeat), indent=1))


class _Masters:
    """fp32 copies of bf16 weights, each with a cast of the gradient and of the weights."""

    def __init__(self, weight: nn.Parameter, kind: type[VectorAdamW]) -> None:
        self._weight, self._master = weight, nn.Parameter(weight.detach().float())
        self._optimizer = kind([self._master])

    @torch.no_grad()
    def step(self) -> None:
        assert self._weight.grad is not None
        self._master.grad = self._weight.grad.float()
        self._optimizer.step()
        self._weight.copy_(self._master)


def _rounded(weight: nn.Parameter, kind: type[VectorAdamW]) -> VectorAdamW:
    optimizer = kind([weight])
    optimizer.roundings = {storage_key(weight): Stream(0, "rounding", "weight")}
    return optimizer


def benchmark_optimizer(elements: int, repeat: int) -> dict[str, dict[str, float]]:
    """Processor nanoseconds per weight and update on this host, by how the weights are stored.

    Args:
        elements: of the one parameter that is updated.
        repeat: updates timed, all ways in alternation; medians are reported.

    Returns:
        By way: `ns`, and the ratio to 32-bit moments of the same weights.
    """

    def weight(dtype: torch.dtype) -> nn.Parameter:
        found = nn.Parameter(torch.randn(elements).to(dtype))
        found.grad = torch.randn(elements).to(dtype)
        return found

    ways: dict[str, Any] = {"fp32/torch_fused": torch.optim.AdamW([weight(torch.float32)])}
    ways["fp32/torch_fused"].param_groups[0]["fused"] = True
    for name, kind in (("adamw", VectorAdamW), ("adamw8bit", BlockAdamW)):
        ways[f"fp32/{name}"] = kind([weight(torch.float32)])
        ways[f"bf16, masters/{name}"] = _Masters(weight(torch.bfloat16), kind)
        ways[f"bf16, no masters/{name}"] = _rounded(weight(torch.bfloat16), kind)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat + _WARM):
        for name, way in ways.items():
            started = time.process_time()
            way.step()
            times[name].append(time.process_time() - started)
    figures = {name: 1e9 * statistics.median(t[_WARM:]) / elements for name, t in times.items()}
    return {
        name: {"ns": ns, "over_adamw": ns / figures[f"{name.partition('/')[0]}/adamw"]}
        for name, ns in figures.items()
    }


if __name__ == "__main__":
    sys.exit(run_tool(main))
