"""Every training method by name, and the phases that a run goes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from relora_ds.config.load import LoadedRun
from relora_ds.config.methods.full import FullConfig
from relora_ds.config.reading.document import Finding
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.errors import ConfigError
from relora_ds.methods.build import meta_model
from relora_ds.methods.full import Full
from relora_ds.methods.galore.galore import GaLore
from relora_ds.methods.interface import Method, matrix_rules
from relora_ds.methods.lora import LoRA
from relora_ds.methods.low_rank import LowRank
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.methods.requirements import unmet_by_rules
from relora_ds.methods.schedule import Schedule
from relora_ds.methods.sltrain.sltrain import SLTrain
from relora_ds.methods.switchlora.switchlora import SwitchLoRA
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.optim.matrix import MatrixOptimizer
from relora_ds.parallel.shape import global_shape
from relora_ds.parallel.zero import ZeroSettings

METHODS: dict[str, type[Method[Any]]] = {
    "full": Full,
    "galore": GaLore,
    "lora": LoRA,
    "low_rank": LowRank,
    "relora": ReLoRA,
    "sltrain": SLTrain,
    "switchlora": SwitchLoRA,
}
"""Keys are the values of `method.name` and the names of the modules."""


def register(name: str, method: type[Method[Any]]) -> None:
    """Make a method known by the name of its settings.

    Raises:
        ValueError: another method has the name.
    """
    if name in METHODS:
        raise ValueError(f"method {name!r} is registered already, as {METHODS[name].__name__}")
    METHODS[name] = method


@contextmanager
def registered(name: str, method: type[Method[Any]]) -> Iterator[None]:
    """Register a method for the duration of a `with` block."""
    register(name, method)
    try:
        yield
    finally:
        del METHODS[name]


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

    @property
    def last_stable_step(self) -> int | None:
        """Updates completed when the learning rate begins its final decay; None if it has none
        within the phase, or falls from the warm-up on."""
        stable = self.schedule.stable_steps
        return self.first_step + stable if stable is not None and stable < self.steps else None

    def learning_rates(self, step: int, optimizer: OptimizerConfig) -> dict[str, float]:
        """Of the update after `step` ones of the run, by the role of a group."""
        factor = self.method.lr_multiplier(step - self.first_step, self.schedule)
        rates = {"dense": optimizer.lr, "adapter": self.adapter_lr}
        if optimizer.adapter is not None:
            rates["pair"] = optimizer.resolved_pair_lr(self.method.config.spectral_lr)
        return {role: factor * rate for role, rate in rates.items()}


def plan_phases(config: RunConfig) -> list[Phase]:
    """The run's phases in order: a warm start if the method has one, then the method."""
    total, seed = config.train.steps, config.train.seed
    phases = []
    first, warm = 0, config.method.warm_start
    if warm is not None:
        first = warm.steps
        full = Full(FullConfig(name="full"), seed, first)
        rate = warm.lr or config.optimizer.lr
        phases.append(Phase(full, "full", 0, first, _schedule(config, total), rate))
    name, steps = config.method.name, total - first
    schedule, dtype = _schedule(config, steps), DTYPES[config.train.precision]
    method = METHODS[name](
        config.method,
        seed,
        steps,
        dtype,
        schedule.stable_steps,
        round_ending=lambda step: config.islands.round_ending(first + step),
    )
    rate = config.optimizer.resolved_adapter_lr * config.method.rate_factor
    phases.append(Phase(method, name, first, steps, schedule, rate))
    return phases


def check_requirements(run: LoadedRun, zero: ZeroSettings) -> None:
    """Make sure, before anything is built, that a run offers what its methods need.

    Args:
        run: the checked run description.
        zero: its ZeRO settings.

    Raises:
        ConfigError: it does not; names every key concerned.
    """
    findings: list[Finding] = []
    for phase in plan_phases(run.config):
        findings += phase.method.requirements.unmet(phase.name, run.config, zero.stage)
        findings += unmet_by_rules(phase.name, run.config, zero, _rules(phase.method, run))
    problems = run.document.report(findings)
    if problems:
        raise ConfigError(problems)


def _rules(method: Method[Any], run: LoadedRun) -> list[tuple[torch.Size, MatrixOptimizer]]:
    """Global shapes of what a method updates matrix by matrix, and what updates it."""
    model = meta_model(run.architecture, method, run.config.train)
    rules = matrix_rules(method, run.config.optimizer, model)
    return [(global_shape(parameter), rule) for parameter, rule in rules.items()]


def _schedule(config: RunConfig, steps: int) -> Schedule:
    chosen = config.schedule
    rates = chosen.name, steps, chosen.warmup_steps, chosen.min_lr_ratio
    return Schedule(*rates, chosen.decay_length(steps), chosen.decay_shape)
