"""Settings of SwitchLoRA and their rules. Defaults are the published settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from relora_ds.config.base import NonNegativeInt, PositiveFloat
from relora_ds.config.methods.adapter import AdapterConfig
from relora_ds.config.methods.base import WarmStarted
from relora_ds.config.methods.catalogue import register_settings
from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from relora_ds.config.spread.islands import IslandsConfig


@register_settings
class SwitchLoRAConfig(WarmStarted, AdapterConfig):
    """SwitchLoRA: replace single vectors of the adapters by candidates, a few at every step, while
    W absorbs the difference (arXiv 2406.06564). Events stop with the last update."""

    title: ClassVar[str | None] = "SwitchLoRA"

    name: Literal["switchlora"]
    """Chooses this method."""
    alpha: PositiveFloat | None = None
    """Numerator of the adapter scale alpha / rank. Default: 1, as in the authors' code."""
    init: Literal["kaiming", "balanced"] = "balanced"
    """Distribution of factors and candidates. `balanced`: both sides non-zero (section 3 of the
    paper). `kaiming`: A uniform on +-1/sqrt(in_features), B zero (the authors' `origin_lora`)."""
    interval: PositiveFloat = 40.0
    """Steps after which a vector is replaced on average, at the start; at least twice
    `freeze_steps`. It grows as switching fades out."""
    descent_rate: PositiveFloat = 0.1
    """Share of the method's steps after which 0.3 of the initial switching frequency is left."""
    freeze_steps: NonNegativeInt = 5
    """Updates for which the counterpart of a replaced vector is not trained."""
    selection: Literal["random", "ring"] = "random"
    """Which vectors and candidates are taken. `random`: any, none twice before all were used.
    `ring`: the authors' order, in which only 2 of N pairs of candidates ever meet."""
    candidates: Literal["host", "device"] = "host"
    """Where replaced vectors wait: in host memory, one copy per node, or beside the model."""

    @property
    def scale(self) -> float:
        """alpha / rank, alpha being 1 by default whatever the initialisation."""
        return (1.0 if self.alpha is None else self.alpha) / self.rank

    @property
    def spectral_lr(self) -> float:
        return 1.25e-2  # 2.5e-2 ends a quarter worse (docs/results.md)

    def expected_switches(self, step: int, steps: int) -> float:
        """Vectors of one factor to replace after `step` of `steps` updates, on average.

        rank / interval, falling to 0.3 of itself over `descent_rate` of the steps (the paper's text
        says a third; its code, followed here, 0.3).
        """
        rate = 0.3 ** ((step + 1) / (self.descent_rate * steps))
        return self.rank / self.interval * max(rate, 1e-8)

    def switches_between(self, since: int, step: int, steps: int) -> float:
        """Vectors of one factor to replace together after `step` of `steps` updates, on average,
        where the last time was after `since`."""
        return sum(self.expected_switches(each + 1, steps) for each in range(since, step))

    def rules(self) -> tuple[Rule, ...]:
        return (
            *super().rules(),
            self.frozen_vectors_thaw_between_switches,
            self.switches_find_vectors,
            self.switches_of_rounds_find_vectors,
            self.switches_find_common_weights,
            self.switched_scale_is_fixed,
            self.switches_have_optimizer,
        )

    def frozen_vectors_thaw_between_switches(self) -> Iterator[Finding]:
        if self.interval < 2 * self.freeze_steps:
            yield Finding(
                ("method", "interval"),
                f"is {self.interval:g}, but must be at least twice method.freeze_steps "
                f"({self.freeze_steps}), or there are more frozen vectors than vectors: "
                f"write {2 * self.freeze_steps} or more, or shorten the freeze",
            )

    def switches_find_vectors(self, architecture: ModelConfig) -> Iterator[Finding]:
        """An event takes as many vectors of A as of B, of other indices, and as many candidates."""
        count = math.ceil(self.rank / self.interval)
        smallest = min(min(shape) for shape in projection_shapes(architecture).values())
        free = min(self.rank // 2, smallest - self.rank)
        if count > free and self.rank < smallest:
            yield Finding(
                ("method", "interval"),
                f"is {self.interval:g}, so that {count} of {self.rank} vectors are replaced at "
                f"once, but only {max(free, 0)} are free: half of method.rank, and method.rank "
                f"less than the shortest side ({smallest}) of a projection, are the limits; "
                "lengthen the interval or change the rank",
            )

    def switches_of_rounds_find_vectors(
        self,
        architecture: ModelConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        islands: IslandsConfig,
    ) -> Iterator[Finding]:
        """Islands that train apart replace all at once what is due in a round."""
        if parallel.islands == 1 or islands.share_gradients:
            return
        first = 0 if self.warm_start is None else self.warm_start.steps
        smallest = min(min(shape) for shape in projection_shapes(architecture).values())
        room = min(self.rank // 2, smallest - self.rank)
        if room < 1:  # which is refused in any case
            return
        begins = [at for at, _ in islands.lengths()] + [train.steps]
        for number, (begin, every) in enumerate(islands.lengths()):
            if begins[number + 1] <= first:
                continue
            start = max(begin - first, 0)  # where they are most frequent
            due = self.switches_between(start, start + every, train.steps - first)
            # counterparts of this many rounds are frozen at once
            rounds = max(1, math.ceil(self.freeze_steps / every))
            if math.ceil(due) > room or due * rounds > room:
                ramp = number < len(islands.ramp)
                yield Finding(
                    ("islands", "ramp", number, 1) if ramp else ("islands", "every"),
                    f"is {every}, so that {due:.3g} of {self.rank} vectors of a factor are to be "
                    f"replaced at the end of a round, but only {room / rounds:.3g} are free: write "
                    "less, begin with shorter rounds (islands.ramp), as switches become rare, or "
                    f"set method.interval to {math.ceil(self.interval * due * rounds / room)} or "
                    "more",
                )

    def switches_find_common_weights(
        self, parallel: ParallelConfig, islands: IslandsConfig
    ) -> Iterator[Finding]:
        if parallel.islands == 1:
            return
        transport = islands.transport
        for key, value, usual in (
            ("fragments", transport.fragments, 1),
            ("overlap", transport.overlap, 0),
        ):
            if value != usual:
                yield Finding(
                    ("islands", "transport", key),
                    f"is {value}, but method {self.name} replaces vectors at the end of every "
                    "round, where all weights have to be common and nothing may be on its way: "
                    f"write {usual}",
                )

    def switched_scale_is_fixed(self) -> Iterator[Finding]:
        if self.trainable_scaling:
            yield Finding(
                ("method", "trainable_scaling"),
                "is true, but a switch needs a fixed scale, which W absorbs the difference with: "
                "write false, and choose the scale by method.alpha",
            )

    def switches_have_optimizer(self, optimizer: OptimizerConfig) -> Iterator[Finding]:
        if not optimizer.is_ours:
            yield Finding(
                ("optimizer", "name"),
                f"is {optimizer.name}, but only adamw and adamw8bit count steps per adapter vector "
                "and freeze single ones, which a switch needs: use adamw",
            )
