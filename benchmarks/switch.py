"""What switches cost a training step: events and per-vector AdamW beside a live step."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.switch_kernels import benchmark_update
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.engine import TrainEngine
from relora_ds.errors import ConfigError
from relora_ds.methods.build import build_model
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import InitialWeights

_WARM = 2  # nothing is switched before the first step; the second one fills caches


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
    draw = InitialWeights(architecture, train.seed)
    model = build_model(architecture, method, train, draw, world.device)
    ranks = {factor.shape[axis] for factor, axis in method.vector_axes(model).items()}
    if not ranks:
        raise ConfigError(f"--run: {config.method.name} has no vectors to switch; use switchlora")
    shapes = [
        (layer.spec.out_features, layer.spec.in_features)
        for layer in projection_layers(model).values()
    ]
    engine = TrainEngine(model, method, config, zero, lambda: None)
    engine.set_learning_rates({"dense": 1e-4, "adapter": 1e-4})
    with torch.no_grad():
        session = method.start(engine.state, engine.model)
    size = (train.micro_batch_size, train.seq_length + 1)
    micro = train.global_batch_size // train.micro_batch_size
    tokens = torch.randint(0, architecture.vocab_size, (micro, *size))
    events, whole = [], []
    for step in range(_WARM + steps):
        started = time.perf_counter()
        with torch.no_grad():
            session.before_step(step)
        switched = time.perf_counter()
        engine.train_step(tokens.unbind(0))[0].item()
        events.append(switched - started)
        whole.append(time.perf_counter() - started)
    distributed.stop()
    event_s, step_s = (statistics.median(found[_WARM:]) for found in (events, whole))
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
