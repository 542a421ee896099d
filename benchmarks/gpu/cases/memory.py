"""Stage J: the 7B run that is meant for one small GPU, in fact and by the planner's closed form."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu.case import Case, CaseSkippedError, Figures, Sizes
from benchmarks.gpu.runs import METHODS, SmallRun, architecture, batches, join, run_config
from relora_ds.config.load import load_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.planning.memory_report import closed_form, storage_plan

_ROOT = Path(__file__).resolve().parents[3]
_TOLERANCE = 0.03
# what a meter of weights, gradients, states and indices agrees upon
_HELD = ("weights", "indices", "gradients", "states")


def cases(tiny: bool) -> list[Case]:
    """The whole stage."""
    return [Case("J", "7b sltrain", planned, expected_s=70, value=100, limit_s=200, alone=True)]


def planned(device: torch.device, sizes: Sizes) -> Figures:
    """Two updates; what is held is within 3 % of what was planned."""
    config, model = _seven_billion() if not sizes.tiny else _small(sizes)
    topology = join(config)
    run = SmallRun(config, topology, {"stage": 0}, model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step, tokens in enumerate(batches(config, model.vocab_size, 2)):
        run.train_step(step, tokens)
    measured = run.engine.memory.measured
    assert measured is not None, "the meter has not measured the first step"
    plan = storage_plan(config, 0, topology.dp_size, device)
    expected = closed_form(config, model, run.phase.method, plan).as_dict()
    found = measured.as_dict()
    held = sum(found[name] for name in _HELD)
    wanted = sum(expected[name] for name in _HELD)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    run.destroy()
    off = held / wanted - 1
    assert abs(off) <= _TOLERANCE, f"held {held} bytes, planned {wanted}: {off:+.1%}"
    return {"held_bytes": held, "planned_bytes": wanted, "off": off, "peak_bytes": peak}


def _seven_billion() -> tuple[RunConfig, ModelConfig]:
    loaded = load_run_config(_ROOT / "configs/run/llama_7b_sltrain_single_gpu.yaml")
    need = 24e9
    free, _ = torch.cuda.mem_get_info()
    if free < need:
        raise CaseSkippedError(f"{free / 1e9:.1f} GB are free, and the run is meant for 24")
    return loaded.config, loaded.architecture


def _small(sizes: Sizes) -> tuple[RunConfig, ModelConfig]:
    config = run_config(
        METHODS["sltrain"],
        precision="bf16",
        master_weights=False,
        per_layer_update=True,
        global_batch_size=2,
        optimizer={"name": "adamw8bit"},
    )
    return config, architecture(sizes)
