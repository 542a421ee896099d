"""Settings of GaLore and their rules. Defaults are the published settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from relora_ds.config.base import PositiveFloat, PositiveInt
from relora_ds.config.methods.base import WarmStarted, WithFactors
from relora_ds.config.methods.catalogue import register_settings
from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.sections import OptimizerConfig, ParallelConfig


@register_settings
class GaLoreConfig(WarmStarted, WithFactors):
    """GaLore: Adam on gradients that are projected to a subspace of rank r, which is chosen anew
    every few hundred updates (Zhao et al., arXiv 2403.03507)."""

    title: ClassVar[str | None] = "GaLore"

    name: Literal["galore"]
    """Chooses this method."""
    update_every: PositiveInt = 200
    """Optimizer steps between refreshes of the subspace, the first one before the first update."""
    scale: PositiveFloat = 0.25
    """Factor on the learning rate of the projections, `optimizer.adapter_lr` or `optimizer.lr`."""
    transport: Literal["rotate", "none"] = "rotate"
    """What becomes of Adam's moments at a refresh. `rotate`: they are carried over to the new
    basis. `none`: they stay as they are, though they belong to the old one (the authors')."""
    side: Literal["shorter", "longer", "left", "right"] = "shorter"
    """Which singular vectors of a gradient (m, n) span the subspace: those of its `left` side (m),
    of its `right` side (n), or of the `shorter` or `longer` of the two, the right one where they
    are alike. The authors' `proj_type` std, reverse_std, left and right."""
    svd: Literal["exact", "randomised"] = "exact"
    """How the leading singular vectors of a gradient are found."""

    @property
    def has_frozen_base(self) -> bool:
        return True

    @property
    def refreshes_every(self) -> int:
        return self.update_every

    def is_right(self, m: int, n: int) -> bool:
        """Whether the subspace of a weight (m, n) is spanned by vectors of length n."""
        if self.side in ("left", "right"):
            return self.side == "right"
        return m == n or (m > n) == (self.side == "shorter")

    @property
    def rate_factor(self) -> float:
        return self.scale

    def rules(self) -> tuple[Rule, ...]:
        return (
            *super().rules(),
            self.frozen_weight_does_not_decay,
            self.rotated_moments_are_plain,
            self.subspace_is_not_cut,
        )

    def frozen_weight_does_not_decay(self, optimizer: OptimizerConfig) -> Iterator[Finding]:
        if optimizer.weight_decay:
            yield Finding(
                ("optimizer", "weight_decay"),
                f"is {optimizer.weight_decay:g}, but method galore moves its projections within a "
                "subspace, where a decay of the whole weight has no place: write 0",
            )

    def rotated_moments_are_plain(self, optimizer: OptimizerConfig) -> Iterator[Finding]:
        if self.transport == "rotate" and optimizer.name == "adamw8bit":
            yield Finding(
                ("method", "transport"),
                "is rotate, but optimizer.name adamw8bit stores codes, which cannot be carried "
                "over to another basis: use adamw, or write none",
            )

    def subspace_is_not_cut(self, parallel: ParallelConfig) -> Iterator[Finding]:
        if parallel.tensor > 1 and parallel.low_rank_plan == "act":
            yield Finding(
                ("parallel", "low_rank_plan"),
                "is act, but method galore cuts nothing along the rank, because moments that are "
                "carried over to another basis need whole rows: write auto or fold",
            )
