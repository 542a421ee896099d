"""Stages H and I: where the time of a step goes, and how fast every method trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.case import Case, Figures, Sizes, synchronize
from benchmarks.gpu.runs import SmallRun, architecture, batches, join, run_config
from relora_ds.accounting.flops import flops_per_token
from relora_ds.config.architecture import read_model_config
from relora_ds.config.model import ModelConfig
from relora_ds.train.telemetry.peak import peak_flops

_MODELS = Path(__file__).resolve().parents[3] / "configs" / "model"
_METHODS = ("full", "relora", "switchlora", "sltrain", "low_rank")
_SEQUENCE = 512
_WARM, _MEASURED, _PROFILED = 3, 10, 2
_TOP = 15
# share of the hidden size that is the rank of a method, as published
_RANK = {"relora": 16, "switchlora": 4, "sltrain": 4, "low_rank": 4}


def profile_cases(tiny: bool) -> list[Case]:
    """Stage H: one case per method at 1.3B."""
    return [
        Case("H", method, profiled, {"method": method}, 24, 20, limit_s=100, alone=True)
        for method in _METHODS
    ]


def cases(tiny: bool) -> list[Case]:
    """Stage I: one case per model and number of tokens; its methods take turns in one process."""
    wanted = {"1b": 90, "350m": 50, "130m": 30, "60m": 25}
    found = []
    for size, seconds in wanted.items():
        for tokens in (8192, 32768):
            arguments = {"size": size, "tokens": tokens}
            name = f"{size} {tokens // 1024} Ki"
            worth = {"1b": 100, "350m": 40, "130m": 20, "60m": 20}[size] / (tokens // 8192)
            limit = 3 * seconds
            case = Case("I", name, rates, arguments, seconds, worth, limit_s=limit, alone=True)
            found.append(case)
    # the only one of these models whose MLP has rows that are not aligned
    as_it_is = {"size": "1b", "tokens": 8192, "pad_mlp": "off"}
    name = "1b 8 Ki, MLP as it is"
    found.insert(1, Case("I", name, rates, as_it_is, 90, 90, limit_s=270, alone=True))
    return found[:1] if tiny else found


def _settings(method: str, hidden: int) -> dict[str, Any]:
    rank = max(4, hidden // _RANK.get(method, 1))
    more: dict[str, dict[str, Any]] = {
        "full": {},
        "relora": {"rank": rank, "alpha": rank, "merge_every": 4, "restart_warmup_steps": 1},
        # as at the start of a run, where almost every step switches
        "switchlora": {"rank": rank, "interval": 40, "freeze_steps": 5},
        "sltrain": {"rank": rank, "alpha": rank, "sparsity": 0.03},
        "low_rank": {"rank": rank, "init": "xavier"},
    }
    return {"name": method, **more[method]}


def _start(
    sizes: Sizes, method: str, model: ModelConfig, tokens: int, pad_mlp: str = "auto"
) -> tuple[SmallRun, torch.Tensor]:
    length = sizes.pick(16, min(_SEQUENCE, model.max_position_embeddings))
    count = sizes.pick(2, tokens // length)
    config = run_config(
        _settings(method, model.hidden_size),
        precision="bf16",
        pad_mlp=pad_mlp,
        steps=100,
        seq_length=length,
        micro_batch_size=count,
        global_batch_size=count,
    )
    run = SmallRun(config, join(config), {"stage": 1}, model)
    batch = batches(config, model.vocab_size, 1)[0]
    return run, batch.pin_memory() if run.topology.device.type == "cuda" else batch


def _model(sizes: Sizes, name: str) -> ModelConfig:
    return architecture(sizes) if sizes.tiny else read_model_config(_MODELS / f"llama_{name}.json")


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def profiled(device: torch.device, sizes: Sizes, method: str) -> Figures:
    """Kernels launched, what the host and the device take per step, and the longest kernels."""
    run, tokens = _start(sizes, method, _model(sizes, "1b"), 8192)
    for step in range(_WARM):
        run.train_step(step, tokens)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        started = time.perf_counter()
        for step in range(_WARM, _WARM + _PROFILED):
            run.train_step(step, tokens)
        host = time.perf_counter() - started
        synchronize(device)
        whole = time.perf_counter() - started
    kind = device.type.upper()
    kernels = [event for event in seen.events() or [] if event.device_type.name == kind]
    totals: dict[str, float] = {}
    for event in kernels:
        span = event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
        totals[event.name] = totals.get(event.name, 0.0) + span
    longest = sorted(totals.items(), key=lambda pair: -pair[1])[:_TOP]
    run.destroy()
    return {
        "launches_per_step": len(kernels) // _PROFILED,
        "host_ms_per_step": 1e3 * host / _PROFILED,
        "ms_per_step": 1e3 * whole / _PROFILED,
        "device_busy": sum(totals.values()) / 1e6 / whole,
        "peak_bytes": _peak_bytes(device),
        "longest_kernels_us_per_step": {name: us / _PROFILED for name, us in longest},
    }


def rates(
    device: torch.device, sizes: Sizes, size: str, tokens: int, pad_mlp: str = "auto"
) -> Figures:
    """Tokens per second of every method; full rank comes first and last, to show a drift."""
    model = _model(sizes, size)
    figures: Figures = {}
    for method in (*_METHODS, "full again"):
        name = method.partition(" ")[0]
        found = _rate(device, sizes, name, model, tokens, pad_mlp)
        figures |= {f"{method} {name}": value for name, value in found.items()}
    for method in _METHODS[1:]:
        ratio = figures["full median_ms"] / figures[f"{method} median_ms"]
        figures[f"{method} times full"] = ratio
    return figures


def _rate(
    device: torch.device, sizes: Sizes, method: str, model: ModelConfig, tokens: int, pad_mlp: str
) -> Figures:
    run, batch = _start(sizes, method, model, tokens, pad_mlp)
    for step in range(_WARM):
        run.update(step, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    measured = sizes.pick(3, _MEASURED)
    steps, events = [], []
    for step in range(_WARM, _WARM + measured):
        before = _milliseconds(device, lambda at=step: run.before_step(at))
        steps.append(_milliseconds(device, lambda at=step: run.train_step(at, batch)))
        after = _milliseconds(device, lambda at=step: run.after_step(at + 1))
        events.append(before + after)
    median, trained = statistics.median(steps), run.config.train
    per_step = trained.micro_batch_size * trained.seq_length
    rate = per_step / median * 1e3
    flops = flops_per_token(run.engine.model, trained.seq_length)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, "bf16")
    run.destroy()
    return {
        "median_ms": median,
        "spread_ms": max(steps) - min(steps),
        "tokens_per_s": rate,
        "mfu": None if peak is None else rate * flops / peak,
        "longest_event_ms": max(events),
        "peak_bytes": _peak_bytes(device),
    }


def _milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)
