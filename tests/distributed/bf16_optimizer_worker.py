"""DeepSpeed's `BF16_Optimizer` on two ranks: its layout, its losses, its checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from relora_ds.checkpoint.inventory import take_inventory
from relora_ds.checkpoint.restore import load_side_tensors, side_tensors
from relora_ds.checkpoint.saved_state import open_state
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.layouts import Bf16Partitions
from relora_ds.engine.engine import TrainEngine
from relora_ds.engine.precision import base_precision
from relora_ds.methods.build import build_model
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.parallel.topology import Topology
from tests.distributed import relora_worker as base

CONFIG = base.run_config(1, base.RESETS["zero"], "bf16")
BREAK_AT, LAST = 5, 9


def build(topology: Topology, **more: Any) -> tuple[Phase, TrainEngine]:
    phase = plan_phases(CONFIG)[-1]
    source = {"zero_optimization": {"stage": 1}, **more}
    resolved = resolve_deepspeed_config(source, CONFIG, topology.dp_size)
    draw = InitialWeights(base.ARCHITECTURE, CONFIG.train.seed)
    model = build_model(base.ARCHITECTURE, phase.method, CONFIG.train, draw, topology.device)
    return phase, TrainEngine(model, phase.method, CONFIG, resolved, lambda: None)


def train(
    phase: Phase, engine: TrainEngine, topology: Topology, first: int, last: int
) -> list[float]:
    losses = []
    for step, tokens in enumerate(base.batches()[first:last], start=first):
        engine.set_learning_rates({"dense": 2e-2, "adapter": 3e-2})
        loss, _ = engine.train_step(base.own_share(tokens, topology))
        with torch.no_grad():
            phase.method.after_step(engine.state, engine.model, step + 1)
        losses.append(float(distributed.mean_over_ranks(loss)))
    engine.check_replicas()
    return losses


def contract(engine: TrainEngine) -> list[str]:
    """Parameters of which DeepSpeed's public function does not read what was written."""
    wrong = []
    for number, (name, parameter) in enumerate(engine.model.named_parameters()):
        if parameter in engine.layout.placements:
            numbers = torch.arange(parameter.numel(), dtype=torch.float32)
            pattern = numbers.view(parameter.shape) * 1e-3 + number
            engine.state.write(parameter, pattern)
            master = safe_get_full_fp32_param(parameter)
            same = master is not None and torch.equal(master, pattern)
            if not same or not torch.equal(parameter.detach(), pattern.bfloat16()):
                wrong.append(name)
    return wrong


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    phase, engine = build(topology)
    figures: dict[str, Any] = {"ordinary": train(phase, engine, topology, 0, LAST)}
    engine.destroy()
    phase, engine = build(topology, **fp32)
    figures["layout"] = type(engine.layout) is Bf16Partitions
    figures["losses"] = train(phase, engine, topology, 0, BREAK_AT)
    engine.save(str(output.parent), "tag")
    side = {name: tensor.clone() for name, tensor in side_tensors(engine).items()}
    figures["losses"] += train(phase, engine, topology, BREAK_AT, LAST)
    inventory = take_inventory(engine.model, phase.method, base_precision(CONFIG), torch.bfloat16)
    figures["wrong"] = contract(engine)
    engine.destroy()
    phase, engine = build(topology, **fp32)
    engine.load(str(output.parent), "tag")
    load_side_tensors(engine, side)
    if topology.is_main:
        save_file(side, output.parent / "tag" / "side.safetensors")
    distributed.barrier()
    saved = open_state(output.parent / "tag", inventory, 1, topology.dp_size)
    figures["by_name"] = [
        name
        for name, parameter in engine.model.named_parameters()
        if parameter in engine.layout.placements
        and not torch.equal(
            engine.layout.full_master(parameter), saved.read("master", name, 0, parameter.numel())
        )
    ]
    figures["resumed"] = train(phase, engine, topology, BREAK_AT, LAST)
    engine.destroy()
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
