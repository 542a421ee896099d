"""Checkpoints of two ranks, continued by two, one and four at other ZeRO stages.

Started on two ranks it writes them and goes on; started on others it reads what lies beside OUTPUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from relora_ds.checkpoint.format.record import RunRecord, TrainerState
from relora_ds.checkpoint.format.tensors import split_tensors
from relora_ds.checkpoint.reshape import reshape_checkpoint
from relora_ds.checkpoint.restore import load_state
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.checkpoint.saved_state import SavedState
from relora_ds.checkpoint.store import CheckpointStore
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.engine import TrainEngine
from relora_ds.methods.registry import Phase
from relora_ds.parallel.topology import Topology
from tests.distributed import relora_worker as relora
from tests.distributed import switchlora_worker as switchlora

BREAK_AT, AFTER = 7, 5
RATES = {"dense": 2e-2, "adapter": 3e-2}
# No padding between parameters, several groups and sub-groups, factors that straddle ranks; the
# merge after step 4 leaves residuals, and the one after step 8 comes on the new topology.
CASES: dict[str, tuple[RunConfig, int]] = {
    "relora_fp32_zero2": (relora.run_config(2, relora.RESETS["random"], "fp32"), 2),
    "relora_bf16_zero3": (relora.run_config(3, relora.RESETS["zero"], "bf16"), 3),
    "relora_bf16_zero0": (relora.run_config(0, relora.RESETS["zero"], "bf16"), 0),
    "switchlora_fp32_zero3": (switchlora.run_config(3, "fp32"), 3),
    "switchlora_bf16_zero1": (switchlora.run_config(1, "bf16"), 1),
}
TARGETS = {
    1: {"relora_fp32_zero2": 3, "relora_bf16_zero3": 1, "relora_bf16_zero0": 3,
        "switchlora_fp32_zero3": 0, "switchlora_bf16_zero1": 3},
    4: {"relora_fp32_zero2": 1, "relora_bf16_zero3": 3, "switchlora_fp32_zero3": 3},
}  # fmt: skip


def build(config: RunConfig, stage: int, topology: Topology) -> tuple[Phase, TrainEngine]:
    small = {"stage3_param_persistence_threshold": 200, "sub_group_size": 500}
    phase, engine = relora.build(stage, config, topology, **(small if stage == 3 else {}))
    with torch.no_grad():
        phase.method.attach(engine.state, engine.model)
    return phase, engine


def train(
    phase: Phase, engine: TrainEngine, topology: Topology, first: int, last: int
) -> list[float]:
    losses = []
    for step in range(first, last):
        factor = phase.method.lr_multiplier(step, phase.schedule)
        engine.set_learning_rates({role: factor * rate for role, rate in RATES.items()})
        with torch.no_grad():
            phase.method.before_step(engine.state, engine.model, step)
        tokens = relora.batches()[step]
        loss, _ = engine.train_step(relora.own_share(tokens, topology))
        with torch.no_grad():
            phase.method.after_step(engine.state, engine.model, step + 1)
        losses.append(float(distributed.mean_over_ranks(loss)))
    engine.check_replicas(phase.method.replicas())
    return losses


def save(
    phase: Phase, engine: TrainEngine, topology: Topology, config: RunConfig, stage: int, at: Path
) -> Path:
    plain, tensors = split_tensors(phase.method.state_dict())
    state = TrainerState(
        step=BREAK_AT,
        tokens=0,
        phase=phase.name,
        dp_size=topology.dp_size,
        tp_size=1,
        zero_stage=stage,
        method=plain,
        telemetry={},
        data_fingerprints=[],
    )
    record = RunRecord(state, config, relora.ARCHITECTURE)
    return CheckpointStore(at, None, topology).save(engine, record, tensors, None)


def write(case: str, topology: Topology, directory: Path) -> list[float]:
    """Losses after the break of a run that is not interrupted."""
    config, stage = CASES[case]
    phase, engine = build(config, stage, topology)
    train(phase, engine, topology, 0, BREAK_AT)
    path = save(phase, engine, topology, config, stage, directory / case)
    if topology.is_main:
        reshape_checkpoint(path, directory / f"{case}_reshaped", dp_size=4, stage=3)
    losses = train(phase, engine, topology, BREAK_AT, BREAK_AT + AFTER)
    engine.destroy()
    return losses


def go_on(case: str, stage: int, topology: Topology, directory: Path) -> dict[str, Any]:
    """Losses of a run that continues on this topology, and what its own checkpoint changed."""
    config, _ = CASES[case]
    found: dict[str, Any] = {}
    for form in ("", "_reshaped"):
        source = directory / f"{case}{form}"
        source = source if form else source / f"step_{BREAK_AT}"
        saved = SavedRun(source).state()
        phase, engine = build(config, stage, topology)
        load_state(engine, saved)
        phase.method.load_state_dict(SavedRun(source).method_state())
        distributed.barrier()
        again = directory / f"{case}{form}_by_{topology.dp_size}"
        path = save(phase, engine, topology, config, stage, again)
        if topology.is_main:
            copy = SavedRun(path).state()
            found[f"differences{form}"] = differences(saved, copy)
            methods = [SavedRun(d).method_state() for d in (source, path)]
            same = [same_value(methods[0][key], methods[1][key]) for key in methods[0]]
            found[f"same_method{form}"] = methods[0].keys() == methods[1].keys() and all(same)
        found[f"losses{form}"] = train(phase, engine, topology, BREAK_AT, BREAK_AT + AFTER)
        engine.destroy()
    return found


def differences(first: SavedState, second: SavedState) -> list[str]:
    """Names of what is not bit-identical."""
    ours, theirs = dict(first.tensors()), dict(second.tensors())
    assert len(ours) > 100
    wrong = [n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n])]
    clocks = first.clocks.keys() ^ second.clocks.keys()
    wrong += [n for n, clock in first.clocks.items() if not torch.equal(clock, second.clocks[n])]
    return [*wrong, *clocks, *(["completed"] if first.completed != second.completed else [])]


def same_value(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def main(output: Path) -> None:
    topology = distributed.start(5.0)
    directory = output.parent / "saved"
    if topology.dp_size == 2:
        figures: dict[str, Any] = {case: write(case, topology, directory) for case in CASES}
    else:
        targets = TARGETS[topology.dp_size]
        figures = {case: go_on(case, stage, topology, directory) for case, stage in targets.items()}
    if topology.is_main:
        output.write_text(json.dumps(figures))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
