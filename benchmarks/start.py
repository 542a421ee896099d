"""Time until a model has its initial weights, per method. See --help.

Prints one JSON object: seconds of the clock and of the processor by method. Every parameter is
freed as soon as it has its value, so that a model larger than the memory can be timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.config.architecture import read_model_config
from relora_ds.config.methods.catalogue import method_models
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import METHODS
from relora_ds.model.init import InitialWeights

_EXAMPLE = """
example:
  python benchmarks/start.py --model configs/model/llama_1b.json --rank 512 --threads 1
"""
_SEED = 42


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--model", default="configs/model/llama_1b.json", help="its config.json")
    parser.add_argument("--method", nargs="*", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--rank", type=int, default=512, help="of methods with low-rank factors")
    parser.add_argument("--init", help="method.init of the methods; by default each one's own")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    model, device = read_model_config(parsed.model), torch.device(parsed.device)
    figures = benchmark_start(model, parsed.method, parsed.rank, parsed.init, device)
    print(json.dumps(figures, indent=1))


def benchmark_start(
    architecture: ModelConfig,
    methods: Sequence[str],
    rank: int,
    init: str | None,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Draw the initial weights of every method in turn.

    Args:
        architecture: the model.
        methods: their names.
        rank: of those that have low-rank factors.
        init: their `method.init`; None for the default.
        device: where.

    Returns:
        By method: `seconds` and `processor_seconds`.
    """
    initial = InitialWeights(architecture, _SEED)
    train = TrainConfig(steps=1, seq_length=1, micro_batch_size=1, global_batch_size=1)
    std, figures = architecture.initializer_range, {}

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return initial(name, shape, device)

    for name in methods:
        settings = {"name": name} if name == "full" else {"name": name, "rank": rank}
        if init is not None:
            settings["init"] = init
        method = METHODS[name](method_models()[name].model_validate(settings), _SEED, train.steps)
        started = time.perf_counter(), time.process_time()
        build_model(architecture, method, train, draw, device, _free, random_std=std)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        figures[name] = {
            "seconds": time.perf_counter() - started[0],
            "processor_seconds": time.process_time() - started[1],
        }
    return figures


def _free(name: str, parameter: nn.Parameter) -> None:
    parameter.data = torch.empty(0, device=parameter.device)


if __name__ == "__main__":
    sys.exit(run_tool(main))
