"""Checkpoints of two ranks, continued by one, two and four at other ZeRO stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from relora_ds.checkpoint.format.record import RunRecord, TrainerState
from relora_ds.checkpoint.format.tensors import split_tensors
from relora_ds.checkpoint.method_state import unwrap
from relora_ds.checkpoint.restore import load_state
from relora_ds.checkpoint.resume import state_of_other_topology
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.checkpoint.saved_state import SavedState
from relora_ds.checkpoint.saving.store import CheckpointStore
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import CheckpointConfig
from relora_ds.engine import distributed
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import TINY, Training, batches, changed
from tests.harness.runs import RATES, STEPS, clipped, relora, start, switchlora

BREAK_AT, AFTER = 7, 5


def galore(precision: str) -> RunConfig:
    """A clipped run that chooses bases before updates 1, 5 and 9."""
    method = {"name": "galore", "rank": 3, "update_every": 4}
    return clipped(method, precision, weight_decay=0.0)


def muon() -> RunConfig:
    """A clipped run of full rank with Muon."""
    return clipped({"name": "full"}, matrix="muon")


def spectral() -> RunConfig:
    """A clipped run of SLTrain: pairs of factors with one momentum, values with Adam's moments."""
    method = {"name": "sltrain", "rank": 4, "scale": 0.5, "sparsity": 0.1}
    return clipped(method, adapter="spectral")


def paired(config: RunConfig) -> RunConfig:
    """The run with pairs of factors updated as one."""
    return changed(config, "optimizer", adapter="spectral")


def shared(config: RunConfig, tensor: int) -> RunConfig:
    """The run with every so many ranks sharing a model."""
    return changed(config, "parallel", tensor=tensor)


# No padding between parameters, several groups and sub-groups, factors that straddle ranks; the
# merge after step 4 leaves residuals, and the one after step 8 comes on the new topology.
CASES: dict[str, tuple[RunConfig, int]] = {
    "relora_fp32_zero2": (relora("random", "fp32"), 2),
    "relora_bf16_zero3": (relora("zero", "bf16"), 3),
    "relora_bf16_zero0": (relora("zero", "bf16"), 0),
    "switchlora_fp32_zero3": (switchlora("fp32"), 3),
    "switchlora_bf16_zero1": (switchlora("bf16"), 1),
    "galore_fp32_zero2": (galore("fp32"), 2),
    "galore_bf16_zero3": (galore("bf16"), 3),
    "galore_fp32_shared": (shared(galore("fp32"), 2), 1),
    "muon_fp32_zero2": (muon(), 2),
    "muon_fp32_shared": (shared(muon(), 2), 1),
    "spectral_fp32_zero2": (spectral(), 2),
    "relora_pairs_fp32_zero2": (paired(relora("zero", "fp32")), 2),
    "switchlora_pairs_bf16_zero1": (paired(switchlora("bf16")), 1),
}
"""A run and its stage."""
TARGETS = {
    (1, 1): {"relora_fp32_zero2": 3, "relora_bf16_zero3": 1, "relora_bf16_zero0": 3,
             "switchlora_fp32_zero3": 0, "switchlora_bf16_zero1": 3, "galore_fp32_zero2": 3,
             "galore_bf16_zero3": 1, "galore_fp32_shared": 0, "muon_fp32_shared": 3,
             "spectral_fp32_zero2": 3, "relora_pairs_fp32_zero2": 3,
             "switchlora_pairs_bf16_zero1": 3},
    (4, 1): {"relora_fp32_zero2": 1, "relora_bf16_zero3": 3, "switchlora_fp32_zero3": 3,
             "galore_fp32_zero2": 1, "muon_fp32_zero2": 3},
}  # fmt: skip
"""By number of ranks, and of those that share a model, the stage at which each run goes on."""
RARE = {
    (2, 1): {"galore_fp32_shared": 3},
    (2, 2): {"galore_fp32_zero2": 2, "muon_fp32_zero2": 1, "spectral_fp32_zero2": 1},
}
"""The same for topologies that are tried in the long tests alone."""


def build(config: RunConfig, stage: int, topology: Topology) -> Training:
    """The run under an engine, with one arithmetic at every stage: by itself stage 3 would not keep
    composed weights."""
    config = changed(config, "train", formulation="step")
    parts = 500 if config.optimizer.adapter is None else 100_000  # pairs are stepped together
    small = {"stage3_param_persistence_threshold": 200, "sub_group_size": parts}
    return start(config, stage, topology, **(small if stage == 3 else {}))


def train(run: Training, first: int, last: int) -> list[float]:
    """Losses of updates `first` + 1 to `last`."""
    tokens = batches(STEPS)
    losses = [run.update(step, tokens[step], RATES).loss for step in range(first, last)]
    run.check_replicas()
    return losses


def save(run: Training, stage: int, directory: Path) -> Path:
    """Write a checkpoint after `BREAK_AT` updates; returns its folder."""
    plain, tensors = split_tensors(unwrap(run.session.state_dict())[0])
    state = TrainerState(
        step=BREAK_AT,
        tokens=BREAK_AT * run.config.train.global_batch_size * run.config.train.seq_length,
        phase=run.phase.name,
        dp_size=run.topology.dp_size,
        tp_size=run.topology.tp.size,
        zero_stage=stage,
        method=plain,
        telemetry={},
        data_fingerprints=[],
    )
    record = RunRecord(state, run.config, TINY)
    store = CheckpointStore(directory, CheckpointConfig(keep=None), run.topology)
    [result] = store.save(run.engine, record, tensors, None, last=True)
    assert result.path is not None
    return result.path


def write(topology: Topology, directory: Path, tensor: int) -> dict[str, list[float]]:
    """Checkpoints of the runs that so many ranks share a model of; losses after the break of runs
    that are not interrupted."""
    found = {}
    cases = {name: case for name, case in CASES.items() if case[0].parallel.tensor == tensor}
    for case, (config, stage) in cases.items():
        run = build(config, stage, share_models(topology, config))
        train(run, 0, BREAK_AT)
        path = save(run, stage, directory / case)
        if topology.is_main:
            reshape_checkpoint(path, directory / f"{case}_reshaped", dp_size=4, tp_size=1, stage=3)
        found[case] = train(run, BREAK_AT, BREAK_AT + AFTER)
        run.destroy()
    return found


def go_on(topology: Topology, directory: Path, tensor: int) -> dict[str, dict[str, Any]]:
    """Losses of runs that continue on this topology, and what their own checkpoints changed."""
    targets = (TARGETS | RARE)[topology.world_size, tensor]
    return {
        case: _go_on(topology, directory, case, stage, tensor) for case, stage in targets.items()
    }


def _go_on(
    topology: Topology, directory: Path, case: str, stage: int, tensor: int
) -> dict[str, Any]:
    config = shared(CASES[case][0], tensor)
    topology = share_models(topology, config)
    found: dict[str, Any] = {}
    for form in ("", "_reshaped"):
        source = directory / f"{case}{form}"
        source = source if form else source / f"step_{BREAK_AT}"
        origin = SavedRun(source)
        saved = origin.state()
        run = build(config, stage, topology)
        part = state_of_other_topology(origin, run.topology, stage)
        assert part is not None
        load_state(run.engine, part)
        run.session.load_state_dict(origin.method_state())
        distributed.barrier()
        path = save(run, stage, directory / f"{case}{form}_by_{topology.world_size}_{tensor}")
        if topology.is_main:
            copy = SavedRun(path)
            found[f"differences{form}"] = differences(saved, copy.state())
            ours, theirs = origin.method_state(), copy.method_state()
            same = [same_value(ours[key], theirs[key]) for key in ours]
            found[f"same_method{form}"] = ours.keys() == theirs.keys() and all(same)
        found[f"losses{form}"] = train(run, BREAK_AT, BREAK_AT + AFTER)
        run.destroy()
    return found


def differences(first: SavedState, second: SavedState) -> list[str]:
    """Names of what is not bit-identical."""
    ours, theirs = dict(first.tensors()), dict(second.tensors())
    assert len(ours) > len(first.inventory.trained) + len(first.inventory.frozen)
    wrong = [n for n in ours if n not in theirs or not torch.equal(ours[n], theirs[n])]
    clocks = first.clocks.keys() ^ second.clocks.keys()
    wrong += [n for n, clock in first.clocks.items() if not torch.equal(clock, second.clocks[n])]
    return [*wrong, *clocks, *(["completed"] if first.completed != second.completed else [])]


def same_value(first: Any, second: Any) -> bool:
    """Whether two values of a method's state are the same, bit for bit."""
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
