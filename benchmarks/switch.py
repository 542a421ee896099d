"""Time of a switch and of the optimizer that it needs, against the obvious ways. See --help.

Both sides do the same work in the same run, in alternation, so that a busy machine slows both.
Prints one JSON object: milliseconds and ratios, medians over repetitions. With a run also the share
of a training step that switching takes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from relora_ds.cli.parser import run_tool, tool_parser
from relora_ds.config.load import load_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.assemble import build_engine
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.errors import ConfigError
from relora_ds.methods.build import meta_model
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.numerics.base_weight import Working, apply_product
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock

_EXAMPLE = """
example:
  python benchmarks/switch.py --shape 2736x1024 --rank 256 --switches 6
  python benchmarks/switch.py --run configs/run/llama_130m_switchlora.yaml \\
      model=configs/model/llama_60m.json train.micro_batch_size=8 train.global_batch_size=32
"""
_AGED = {"of one age": 0.0, "half of them aged": 0.5, "aged": 1.0}
_FREEZE = 5
_WARM_KERNELS = 3  # the first repetitions compile a kernel and fill caches
_WARM_STEPS = 2  # nothing is switched before the first step; the second one fills caches
_BETAS, _EPS, _LR = (0.9, 0.999), 1e-8, 1e-3


def main() -> None:
    parser = tool_parser(__doc__, _EXAMPLE)
    parser.add_argument("--shape", default="2736x1024", help="ROWSxCOLUMNS of the weight")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--switches", type=int, default=6, help="vectors of each factor per event")
    parser.add_argument("--projections", type=int, default=8, help="in the optimizer's timing")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--run", metavar="RUN.yaml", help="a SwitchLoRA run; its data is not read")
    parser.add_argument("--steps", type=int, default=5, help="of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override its keys")
    parsed = parser.parse_args()
    rows, cols = (int(side) for side in parsed.shape.split("x"))
    shapes, rank, repeat = [(rows, cols)] * parsed.projections, parsed.rank, parsed.repeat
    figures: dict[str, Any] = {
        "one_projection": benchmark_switch(rows, cols, rank, parsed.switches, repeat),
        "optimizer": {
            name: benchmark_update(shapes, rank, aged, repeat) for name, aged in _AGED.items()
        },
    }
    if parsed.run:
        run = load_run_config(parsed.run, parsed.overrides)
        figures["run"] = benchmark_share(run.config, run.architecture, parsed.steps, repeat)
    print(json.dumps(figures, indent=1))


class _Layer:
    """W, and A and B in one flat tensor as under ZeRO, with clocks of mixed ages."""

    def __init__(self, rows: int, cols: int, rank: int) -> None:
        self.rows, self.cols, self.rank = rows, cols, rank
        self.weight = torch.randn(rows, cols)
        self.base = Working(self.weight.view(-1), self.weight.view(-1).clone())
        self.flat = torch.randn(rank * (rows + cols))
        self.flat.grad = torch.randn_like(self.flat)
        self.clock_a, self.clock_b = VectorClock(rank, 0), VectorClock(rank, 1)
        self.fragment_a = Fragment(0, 0, rank * cols, self.clock_a, cols)
        self.fragment_b = Fragment(0, rank * cols, rank * rows, self.clock_b, rank)
        self.lora_a = self.flat[: rank * cols].view(rank, cols)
        self.lora_b = self.flat[rank * cols :].view(rows, rank)
        self.optimizer = VectorAdamW([self.flat], lr=_LR, betas=_BETAS, eps=_EPS)
        self.optimizer.fragments = {storage_key(self.flat): [self.fragment_a, self.fragment_b]}
        self.step = 0
        self.optimizer.step()

    def candidates(self, count: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """New rows of A and columns of B, and the disjoint indices that they go to."""
        chosen = torch.randperm(self.rank)[: 2 * count]
        new_a, new_b = torch.randn(count, self.cols), torch.randn(count, self.rows)
        return new_a, new_b, list(chosen.split(count))

    def moments(self) -> list[torch.Tensor]:
        state = self.optimizer.state[self.flat]
        return [state["exp_avg"], state["exp_avg_sq"]]

    def switch(self, new_a: torch.Tensor, new_b: torch.Tensor, index: list[torch.Tensor]) -> None:
        """All vectors together: one product, one write and one reset per factor."""
        rows, cols = index
        scale, completed = 1.0 / self.rank, self.step
        old_a, old_b = self.lora_a[rows], self.lora_b[:, cols].t()
        left = torch.cat([self.lora_b[:, rows], (old_b - new_b).t()], dim=1)
        right = torch.cat([old_a - new_a, self.lora_a[cols]])
        apply_product(self.base, self.weight.view(-1), 0, left, right, scale)
        for fragment, vectors, values in (
            (self.fragment_a, rows, new_a),
            (self.fragment_b, cols, new_b),
        ):
            for part in fragment.parts(self.flat, fragment.find(vectors)):
                part.view[part.local] = values[part.asked, part.span]
        for fragment, vectors in ((self.fragment_b, rows), (self.fragment_a, cols)):
            for moment in self.moments():
                for part in fragment.parts(moment, fragment.find(vectors)):
                    part.view[part.local] = 0.0
            fragment.clock.restart(completed, vectors)
            fragment.clock.freeze(completed + _FREEZE, vectors)

    def update(self) -> None:
        self.optimizer.step()
        self.step += 1

    def loop_switch(
        self, new_a: torch.Tensor, new_b: torch.Tensor, index: list[torch.Tensor]
    ) -> None:
        """Switch vector by vector: a pass over W for each of them."""
        scale = 1.0 / self.rank
        state_a, state_b = (
            [m[: self.lora_a.numel()].view_as(self.lora_a) for m in self.moments()],
            [m[self.lora_a.numel() :].view_as(self.lora_b) for m in self.moments()],
        )
        for i, new in zip(index[0].tolist(), new_a, strict=True):
            self.weight += scale * torch.outer(self.lora_b[:, i], self.lora_a[i] - new)
            self.lora_a[i] = new
            for moment in state_b:
                moment[:, i] = 0.0
        for i, new in zip(index[1].tolist(), new_b, strict=True):
            self.weight += scale * torch.outer(self.lora_b[:, i] - new, self.lora_a[i])
            self.lora_b[:, i] = new
            for moment in state_a:
                moment[i] = 0.0

    def loop_update(self) -> None:
        """AdamW with a step per vector, vector by vector."""
        self.step += 1
        grad = self.flat.grad
        assert grad is not None
        split = self.lora_a.numel()
        parts = [
            [t[:split].view_as(self.lora_a), t[split:].view_as(self.lora_b).t()]
            for t in (self.flat, grad, *self.moments())
        ]
        for side, clock in enumerate((self.clock_a, self.clock_b)):
            ages = clock.ages(self.step).tolist()
            for p, g, m, v, age in zip(*(part[side] for part in parts), ages, strict=True):
                m.lerp_(g, 1.0 - _BETAS[0])
                v.mul_(_BETAS[1]).addcmul_(g, g, value=1.0 - _BETAS[1])
                c1, c2 = 1.0 - _BETAS[0] ** age, 1.0 - _BETAS[1] ** age
                p.addcdiv_(m, (v.sqrt() / c2**0.5).add_(_EPS), value=-_LR / c1)


@torch.no_grad()
def benchmark_switch(
    rows: int, cols: int, rank: int, switches: int, repeat: int
) -> dict[str, float]:
    """Milliseconds and ratios for one projection.

    Args:
        rows: height of W.
        cols: width of W.
        rank: vectors per factor.
        switches: vectors of each factor that an event replaces.
        repeat: events timed; medians are reported.
    """
    layer, other = _Layer(rows, cols, rank), _Layer(rows, cols, rank)
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], None]) -> None:
        started = time.perf_counter()
        call()
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - started))

    for _ in range(repeat + _WARM_KERNELS):
        drawn = layer.candidates(switches)
        timed("switch_ms", lambda d=drawn: layer.switch(*d))
        timed("update_ms", layer.update)
        timed("loop_switch_ms", lambda d=drawn: other.loop_switch(*d))
        timed("loop_update_ms", other.loop_update)
    figures = {name: statistics.median(values[_WARM_KERNELS:]) for name, values in times.items()}
    ours = figures["switch_ms"] + figures["update_ms"]
    loop = figures["loop_switch_ms"] + figures["loop_update_ms"]
    return figures | {"ours_over_loop": ours / loop}


def _clocked(shapes: list[tuple[int, int]], rank: int, aged: float) -> tuple[int, list[Fragment]]:
    """Factors A and B of projections in one flat tensor: its size, and what has a clock."""
    size, fragments = 0, []
    for number, (rows, cols) in enumerate(shapes):
        for axis, shape in enumerate(((rank, cols), (rows, rank))):
            clock, count = VectorClock(rank, axis), shape[0] * shape[1]
            if int((number + 1) * aged) > int(number * aged):
                clock.tensors()["born"].copy_(torch.arange(rank) % 50 - 50)
                clock.freeze(10**9, torch.arange(0, rank, 40))
            fragments.append(Fragment(0, size, count, clock, shape[1]))
            size += count
    return size, fragments


@torch.no_grad()
def benchmark_update(
    shapes: list[tuple[int, int]], rank: int, aged: float, repeat: int
) -> dict[str, float]:
    """Processor milliseconds of one AdamW step on the factors of projections in one flat tensor.

    torch's fused AdamW steps as many elements of one age.

    Args:
        shapes: rows and columns of the projections.
        rank: vectors per factor.
        aged: share of the projections of which every vector has an age of its own and some are
            frozen; the others are of one age.
        repeat: steps timed; medians are reported.
    """
    size, fragments = _clocked(shapes, rank, aged)
    ours, theirs = torch.randn(size), torch.randn(size)
    ours.grad, theirs.grad = torch.randn(size), torch.randn(size)
    optimizer = VectorAdamW([ours], lr=_LR, betas=_BETAS, eps=_EPS)
    optimizer.fragments = {storage_key(ours): fragments}
    fused = torch.optim.AdamW([theirs], lr=_LR, betas=_BETAS, eps=_EPS, fused=True)
    times: dict[str, list[float]] = {"step_ms": [], "fused_ms": []}
    for _ in range(repeat + _WARM_KERNELS):
        for name, each in (("step_ms", optimizer), ("fused_ms", fused)):
            started = time.process_time()
            each.step()
            times[name].append(1e3 * (time.process_time() - started))
    figures = {name: statistics.median(values[_WARM_KERNELS:]) for name, values in times.items()}
    return figures | {"elements": size, "step_over_fused": figures["step_ms"] / figures["fused_ms"]}


def benchmark_share(
    config: RunConfig, architecture: ModelConfig, steps: int, repeat: int
) -> dict[str, float]:
    """Seconds of a training step of one process at stage 1, and of its part that switching costs.

    Args:
        config: a run with SwitchLoRA; its data is not read.
        architecture: the model.
        steps: training steps timed; medians are reported.
        repeat: optimizer steps timed on the model's factors, against torch's fused AdamW.

    Raises:
        ConfigError: the run's method has no vectors to switch.
    """
    world = distributed.start(config.train.timeout_minutes)
    method, train = plan_phases(config)[-1].method, config.train
    zero = resolve_deepspeed_config({"zero_optimization": {"stage": 1}}, config, 1)
    model = meta_model(architecture, method, train)
    ranks = {factor.shape[axis] for factor, axis in method.vector_axes(model).items()}
    if not ranks:
        raise ConfigError(f"--run: {config.method.name} has no vectors to switch; use switchlora")
    shapes = [
        (layer.spec.out_features, layer.spec.in_features)
        for layer in projection_layers(model).values()
    ]
    engine = build_engine(architecture, method, config, zero, world)
    engine.set_learning_rates(dict.fromkeys(("dense", "adapter", "pair"), 1e-4))
    with torch.no_grad():
        session = method.start(engine.state, engine.model)
    size = (train.micro_batch_size, train.seq_length + 1)
    micro = train.global_batch_size // train.micro_batch_size
    tokens = torch.randint(0, architecture.vocab_size, (micro, *size))
    events, whole = [], []
    for step in range(_WARM_STEPS + steps):
        started = time.perf_counter()
        with torch.no_grad():
            session.before_step(step)
        switched = time.perf_counter()
        engine.train_step(tokens.unbind(0))[0].item()
        events.append(switched - started)
        whole.append(time.perf_counter() - started)
    distributed.stop()
    event_s, step_s = (statistics.median(found[_WARM_STEPS:]) for found in (events, whole))
    rank = ranks.pop()
    alike, update = (benchmark_update(shapes, rank, aged, repeat) for aged in (0.0, 1.0))
    extra_s = 1e-3 * (update["step_ms"] - update["fused_ms"])
    return {
        "tokens": train.global_batch_size * train.seq_length,
        "step_s": step_s,
        "event_s": event_s,
        "optimizer_extra_s": extra_s,
        "optimizer_over_fused": update["step_over_fused"],
        "optimizer_over_fused_of_one_age": alike["step_over_fused"],
        "share": (event_s + extra_s) / step_s,
    }


if __name__ == "__main__":
    sys.exit(run_tool(main))
