"""Stage F: what makes the host wait for the device in a step, and in an event.

On a GPU, torch tells every operation that waits, and the stack says who asked for it. On a CPU the
model's forward and backward pass run on tensors without values, where whatever reads one raises.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.case import Case, Figures, Sizes
from benchmarks.gpu.runs import METHODS, SmallRun, architecture, batches, join, run_config
from relora_ds.methods.build import meta_model
from relora_ds.methods.registry import plan_phases

_WARM_STEPS, _STEADY_STEPS = 5, 3
_OWN = "relora_ds"
_PACKAGE = f"/{_OWN}/"
# DeepSpeed reads a flag or a norm in its own step; see docs/gpu.md
_LIBRARIES = ("/deepspeed/",)


def cases(tiny: bool) -> list[Case]:
    """One case per method."""
    return [
        Case("F", method, waits, {"method": method}, expected_s=7, value=12) for method in METHODS
    ]


def waits(device: torch.device, sizes: Sizes, method: str) -> Figures:
    """Steady steps of ours never wait; what an event waits for is counted."""
    if device.type != "cuda":
        return _without_values(sizes, method)
    config, model = run_config(METHODS[method], precision="bf16", steps=40), architecture(sizes)
    topology = join(config)
    run = SmallRun(config, topology, {"stage": 1}, model)
    tokens = batches(config, model.vocab_size, 1)[0]
    for step in range(_WARM_STEPS):
        run.update(step, tokens)
    steady: Counter[str] = Counter()
    events: Counter[str] = Counter()
    for step in range(_WARM_STEPS, _WARM_STEPS + _STEADY_STEPS):
        with _told(events):
            run.before_step(step)
        with _told(steady):
            run.train_step(step, tokens)
        with _told(events):
            run.after_step(step + 1)
    run.destroy()
    ours = {place: count for place, count in steady.items() if place.startswith(_OWN)}
    assert not ours, f"a step waits for the device in {ours}"
    return {
        "in_steps": sum(steady.values()),
        "around_steps": sum(events.values()),
        "where": dict((steady + events).most_common(12)),
    }


@contextmanager
def _told(found: Counter[str]) -> Iterator[None]:
    """Count what waits inside, by the innermost line of ours or of DeepSpeed."""

    def show(message: Warning | str, *rest: object, **more: object) -> None:
        if "synchroniz" in str(message).lower():
            found[_place(traceback.extract_stack())] += 1

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _place(stack: traceback.StackSummary) -> str:
    for frame in reversed(stack):
        for library in _LIBRARIES:
            if library in frame.filename:
                return f"deepspeed/{Path(frame.filename).name}:{frame.lineno}"
        if _PACKAGE in frame.filename:
            return f"{_OWN}/{frame.filename.rpartition(_PACKAGE)[2]}:{frame.lineno}"
    return "elsewhere"


def _without_values(sizes: Sizes, method: str) -> Figures:
    """Reading a value, or mixing devices, raises in this mode."""
    config, model = run_config(METHODS[method]), architecture(sizes)
    described = plan_phases(config)[-1].method
    with FakeTensorMode(allow_non_fake_inputs=True):
        built = meta_model(model, described, config.train)
        shape = (config.train.micro_batch_size, config.train.seq_length + 1)
        loss = built(torch.zeros(shape, dtype=torch.int64, device="meta"))
        loss.backward()
        trained = [p for p in built.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained), "a parameter got no gradient"
    return {"trained": len(trained)}
