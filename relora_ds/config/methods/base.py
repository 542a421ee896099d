"""What the rest of the program asks of any method's settings, and the warm start any may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from relora_ds.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section
from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.sections import TrainConfig


@dataclass(frozen=True)
class WarmStart:
    """Full-rank training at the start of a run, before its method takes over."""

    steps: int
    """Optimizer steps; positive."""
    lr: float | None
    """Peak learning rate of the projections. None: that of everything else that is dense."""


class MethodSettings(Section):
    """Settings of a training method; what is not a key is for a method to override.

    The defaults describe full-rank training. Nothing outside of a method's own modules asks for
    its class: what it must know of every method is a member here.
    """

    title: ClassVar[str | None] = None
    """What texts call the method, if not by its name."""

    name: str
    """Chooses the method; its key in the registries of settings and of methods."""

    @property
    def low_rank(self) -> int | None:
        """Inner dimension r of the factors of every projection, as the key `rank` sets it; None
        without factors."""
        return None

    @property
    def trains_projections(self) -> bool:
        """Whether the projections' weights themselves are trained."""
        return False

    @property
    def moves_pairs(self) -> bool:
        """Whether the optimizer moves trained factors lora_A, lora_B of every projection, so that
        it may treat both as one."""
        return False

    @property
    def has_frozen_base(self) -> bool:
        """Whether a frozen weight lies beside what is trained of a projection."""
        return False

    @property
    def merges_every(self) -> int | None:
        """Optimizer steps between edits of frozen weights that islands make together; None without
        such edits."""
        return None

    @property
    def refreshes_every(self) -> int | None:
        """Optimizer steps between choices that are made from dense gradients of all islands; None
        without such choices."""
        return None

    @property
    def rate_factor(self) -> float:
        """Factor on the learning rate of what is trained of the projections."""
        return 1.0

    @property
    def spectral_lr(self) -> float:
        """Learning rate of factors under spectral updates where none is given."""
        return 2.5e-2

    @property
    def warm_start(self) -> WarmStart | None:
        """Full-rank training that precedes the method within the run."""
        return None

    def rules(self) -> tuple[Rule, ...]:
        """What must hold between these settings, other sections of the run and the model.

        Returns:
            Bound methods, whose parameters name the sections that they read beside the method's.
        """
        return ()

    def warnings(self) -> tuple[Rule, ...]:
        """Rules whose findings are allowed, but probably not meant."""
        return ()


class WithFactors(MethodSettings):
    """Key of a method whose projections have factors."""

    rank: PositiveInt = 128
    """Inner dimension r of the factors; smaller than both sides of every projection."""

    @property
    def low_rank(self) -> int:
        return self.rank


class WarmStarted(MethodSettings):
    """Keys of a method that may take over from full-rank training."""

    warm_start_steps: NonNegativeInt = 0
    """Optimizer steps of full-rank training before the method takes over, within the same run."""
    warm_start_lr: PositiveFloat | None = None
    """Learning rate of the projections during the warm start. Default: `optimizer.lr`."""

    @property
    def warm_start(self) -> WarmStart | None:
        if not self.warm_start_steps:
            return None
        return WarmStart(self.warm_start_steps, self.warm_start_lr)

    def rules(self) -> tuple[Rule, ...]:
        return (*super().rules(), self.warm_start_ends)

    def warnings(self) -> tuple[Rule, ...]:
        return (*super().warnings(), self.warm_start_lr_has_a_use)

    def warm_start_ends(self, train: TrainConfig) -> Iterator[Finding]:
        if self.warm_start_steps >= train.steps:
            yield Finding(
                ("method", "warm_start_steps"),
                f"is {self.warm_start_steps}, but must be less than train.steps ({train.steps}), "
                "or the method never takes over: shorten the warm start or lengthen the run",
            )

    def warm_start_lr_has_a_use(self) -> Iterator[Finding]:
        if self.warm_start_lr is not None and not self.warm_start_steps:
            yield Finding(
                ("method", "warm_start_lr"), "has no effect: method.warm_start_steps is 0"
            )
