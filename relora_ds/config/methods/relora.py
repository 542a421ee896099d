"""Settings of ReLoRA and their rules. Defaults are the published settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from relora_ds.config.base import NonNegativeInt, PositiveInt, Section
from relora_ds.config.methods.adapter import AdapterConfig
from relora_ds.config.methods.base import WarmStarted
from relora_ds.config.methods.catalogue import register_settings
from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.sections import OptimizerConfig, ScheduleConfig, TrainConfig


class ResetConfig(Section):
    """What happens to the adapters' Adam moments at a ReLoRA restart."""

    mode: Literal["zero", "random", "magnitude"] = "zero"
    """Which moments are set to zero. `zero`: all of them. `random`: each element with probability
    `fraction`. `magnitude`: the `fraction` of each parameter's elements that is smallest, exact
    over the whole parameter."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of moments that `mode: random` and `mode: magnitude` prune. Not used by `zero`."""
    joint: bool = True
    """An element keeps its moments only where both survive. `false` is the published form with one
    mask per moment: it leaves first moments without second moments and updates explode."""
    steps: bool = True
    """Restart Adam's bias correction of the adapters together with their moments."""


@register_settings
class ReLoRAConfig(WarmStarted, AdapterConfig):
    """ReLoRA: merge the adapters into W and restart them, again and again (Lialin et al., 2023)."""

    title: ClassVar[str | None] = "ReLoRA"

    name: Literal["relora"]
    """Chooses this method."""
    merge_every: PositiveInt = 1000
    """Optimizer steps between merges, counted from the start of the ReLoRA phase."""
    restart_warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate ramps up again after a merge; less than `merge_every`."""
    merge_in_decay: bool = False
    """Merge and ramp also in the final decay of `schedule.name: wsd`. By default the last merge
    lies before it, and the decay is smooth."""
    adjust_step: NonNegativeInt = 0
    """Steps by which the restart cycle of the schedule is shifted (the authors' `adjust_step`)."""
    reset: ResetConfig = ResetConfig()
    """What happens to the adapters' optimizer state at a merge."""

    @property
    def merges_every(self) -> int:
        return self.merge_every

    def rules(self) -> tuple[Rule, ...]:
        return (
            *super().rules(),
            self.restart_warmup_ends,
            self.warmup_precedes_first_restart,
            self.reset_of_steps_has_optimizer,
            self.pruned_magnitudes_are_stored,
        )

    def warnings(self) -> tuple[Rule, ...]:
        return (*super().warnings(), self.merges_happen, self.decay_is_there_to_merge_in)

    def restart_warmup_ends(self) -> Iterator[Finding]:
        if self.restart_warmup_steps >= self.merge_every:
            yield Finding(
                ("method", "restart_warmup_steps"),
                f"is {self.restart_warmup_steps}, but must be less than method.merge_every "
                f"({self.merge_every}), or the learning rate never recovers from a restart",
            )

    def warmup_precedes_first_restart(self, schedule: ScheduleConfig) -> Iterator[Finding]:
        end = self.adjust_step + schedule.warmup_steps
        if self.adjust_step and end > self.merge_every:
            yield Finding(
                ("method", "adjust_step"),
                f"is {self.adjust_step}, but adjust_step + schedule.warmup_steps "
                f"({schedule.warmup_steps}) may not exceed method.merge_every "
                f"({self.merge_every}): the warm-up would run into the first restart",
            )

    def reset_of_steps_has_optimizer(self, optimizer: OptimizerConfig) -> Iterator[Finding]:
        if self.reset.steps and not optimizer.is_ours:
            yield Finding(
                ("method", "reset", "steps"),
                "is true, but only optimizer.name adamw counts steps per adapter vector, and it is "
                f"{optimizer.name}: use adamw, or write false to keep the count over restarts",
            )

    def pruned_magnitudes_are_stored(self, optimizer: OptimizerConfig) -> Iterator[Finding]:
        if self.reset.mode == "magnitude" and optimizer.name == "adamw8bit":
            yield Finding(
                ("method", "reset", "mode"),
                "is magnitude, but optimizer.name adamw8bit stores codes, whose order is not that "
                "of magnitudes across blocks: use adamw, or write zero or random",
            )

    def merges_happen(self, train: TrainConfig, schedule: ScheduleConfig) -> Iterator[Finding]:
        rest = train.steps - self.warm_start_steps
        stable = None if self.merge_in_decay else schedule.stable_steps(rest)
        length = rest if stable is None else stable
        if self.merge_every >= length and rest > 0:
            before = "" if stable is None else " before its rate decays"
            yield Finding(
                ("method", "merge_every"),
                f"is {self.merge_every}, and ReLoRA runs for {length} steps{before}: no merge will "
                "happen",
            )

    def decay_is_there_to_merge_in(self, schedule: ScheduleConfig) -> Iterator[Finding]:
        if self.merge_in_decay and schedule.name != "wsd":
            yield Finding(
                ("method", "merge_in_decay"),
                f"has no effect: schedule.name is {schedule.name}, which has no stable phase",
            )
