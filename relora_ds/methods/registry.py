"""Every training method by name, and the phases that a run goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relora_ds.config.method import AdapterConfig, FullConfig
from relora_ds.config.schema import RunConfig
from relora_ds.methods.full import Full
from relora_ds.methods.interface import Method
from relora_ds.methods.lora import LoRA
from relora_ds.methods.low_rank import LowRank
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.methods.schedule import Schedule
from relora_ds.methods.sltrain.sltrain import SLTrain
from relora_ds.methods.switchlora.switchlora import SwitchLoRA
from relora_ds.numerics.dtypes import DTYPES

METHODS: dict[str, type[Method[Any]]] = {
    "full": Full,
    "lora": LoRA,
    "low_rank": LowRank,
    "relora": ReLoRA,
    "sltrain": SLTrain,
    "switchlora": SwitchLoRA,
}
"""Keys are the values of `method.name` and the names of the modules."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run in which one method is in charge of one set of modules."""

    method: Method[Any]
    name: str
    """The method's registry key."""
    first_step: int
    """Updates completed before the phase."""
    steps: int
    """Updates within it."""
    schedule: Schedule
    """Spans the whole run during a warm start, the phase itself afterwards."""
    adapter_lr: float
    """Peak learning rate of the adapters, or of the projections where they are dense."""

    @property
    def last_step(self) -> int:
        """Updates completed when the phase is over."""
        return self.first_step + self.steps


def plan_phases(config: RunConfig) -> list[Phase]:
    """The run's phases in order: a warm start if the method has one, then the method."""
    total, seed = config.train.steps, config.train.seed
    warm = config.method.warm_start_steps if isinstance(config.method, AdapterConfig) else 0
    phases = []
    if warm:
        assert isinstance(config.method, AdapterConfig)
        full = Full(FullConfig(name="full"), seed, warm)
        rate = config.method.warm_start_lr or config.optimizer.lr
        phases.append(Phase(full, "full", 0, warm, _schedule(config, total), rate))
    name, steps = config.method.name, total - warm
    method = METHODS[name](config.method, seed, steps, DTYPES[config.train.precision])
    rate = config.optimizer.resolved_adapter_lr
    phases.append(Phase(method, name, warm, steps, _schedule(config, steps), rate))
    return phases


def _schedule(config: RunConfig, steps: int) -> Schedule:
    schedule = config.schedule
    return Schedule(schedule.name, steps, schedule.warmup_steps, schedule.min_lr_ratio)
