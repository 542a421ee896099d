"""DeepSpeed's `BF16_Optimizer`: its layout, its losses, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from relora_ds.checkpoint.inventory import take_inventory
from relora_ds.checkpoint.saved_state import open_state
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.layouts import Bf16Partitions
from relora_ds.engine.precision import base_precision
from relora_ds.parallel.topology import Topology
from tests.harness.build import Training, batches, changed
from tests.harness.resume import load, save
from tests.harness.runs import RATES, relora

BREAK_AT, LAST = 5, 9
_FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def start(topology: Topology, **deepspeed: object) -> Training:
    """A run in bf16 at stage 1, of which every process adds up two micro-batches."""
    config = changed(relora("zero", "bf16"), "train", micro_batch_size=1)
    return Training(config, topology, {"stage": 1}, deepspeed=deepspeed)


def train(run: Training, first: int, last: int) -> list[float]:
    """Losses of updates `first` + 1 to `last`, at constant learning rates."""
    losses = []
    for step, tokens in enumerate(batches(last)[first:], start=first):
        run.engine.set_learning_rates(RATES)
        loss, _ = run.train_step(run.own_share(tokens))
        run.after_step(step + 1)
        losses.append(float(distributed.mean_over_ranks(loss)))
    run.check_replicas()
    return losses


@torch.no_grad()
def contract(run: Training) -> list[str]:
    """Parameters of which DeepSpeed's public function does not read what was written."""
    wrong = []
    for number, (name, parameter) in enumerate(run.named.items()):
        if parameter in run.engine.layout.placements:
            numbers = torch.arange(parameter.numel(), dtype=torch.float32)
            pattern = numbers.view(parameter.shape) * 1e-3 + number
            run.engine.state.weights.write(parameter, pattern)
            master = safe_get_full_fp32_param(parameter)
            same = master is not None and torch.equal(master, pattern)
            if not same or not torch.equal(parameter.detach(), pattern.bfloat16()):
                wrong.append(name)
    return wrong


def figures(topology: Topology, directory: Path) -> dict[str, Any]:
    """Losses of the ordinary run, of one with sums in fp32, and of its second half once more."""
    run = start(topology)
    found: dict[str, Any] = {"ordinary": train(run, 0, LAST)}
    run.destroy()
    run = start(topology, **_FP32_SUMS)
    found["layout"] = type(run.engine.layout) is Bf16Partitions
    found["losses"] = train(run, 0, BREAK_AT)
    saved = save(run, directory)
    found["losses"] += train(run, BREAK_AT, LAST)
    precision = base_precision(run.config)
    inventory = take_inventory(
        run.engine.model, run.method, precision, torch.bfloat16, run.config.optimizer
    )
    found["wrong"] = contract(run)
    run.destroy()
    run = start(topology, **_FP32_SUMS)
    load(run, saved)
    if topology.is_main:
        save_file(saved.side, saved.files / "side.safetensors")
    distributed.barrier()
    state = open_state(saved.files, inventory, 1, topology.dp_size)
    layout = run.engine.layout
    found["by_name"] = [
        name
        for name, parameter in run.named.items()
        if parameter in layout.placements
        and not torch.equal(
            layout.full_master(parameter), state.read("master", name, 0, parameter.numel())
        )
    ]
    found["resumed"] = train(run, BREAK_AT, LAST)
    run.destroy()
    return found
