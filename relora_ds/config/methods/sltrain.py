"""Settings of SLTrain and their rules. Defaults are the published settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from relora_ds.config.base import PositiveFloat
from relora_ds.config.methods.base import WithFactors
from relora_ds.config.methods.catalogue import register_settings
from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.sections import TrainConfig


@register_settings
class SLTrainConfig(WithFactors):
    """SLTrain: every projection is scale * B @ A plus a sparse matrix on a fixed random support,
    and no dense weight is kept (Han et al., 2024)."""

    title: ClassVar[str | None] = "SLTrain"

    name: Literal["sltrain"]
    """Chooses this method."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale alpha / rank on B @ A. Default: 32. Give this or `scale`."""
    scale: PositiveFloat | None = None
    """Factor on B @ A, in place of `alpha` / `rank`; published ones go from 1/4 (60M) to 1/128
    (7B)."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Share delta of a projection's elements that the sparse matrix sets and trains."""
    keep_composed: Literal["auto", "layer", "step"] = "auto"
    """How long the composed dense weight lives. `layer`: for one matrix product, at the price of
    composing it again in the backward pass. `step`: for all micro-batches of an optimizer step, at
    the price of the dense weights' memory. `auto`: as `train.formulation` says."""
    gradient: Literal["auto", "dense", "low_rank"] = "auto"
    """How gradients are formed. `dense`: from the dense weight's gradient, which lives for one
    layer. `low_rank`: products with the factors and a sampled product at the support. `auto`: the
    cheaper one for the shape."""

    @property
    def resolved_scale(self) -> float:
        """The factor on B @ A with its default filled in."""
        if self.scale is not None:
            return self.scale
        return (32.0 if self.alpha is None else self.alpha) / self.rank

    @property
    def moves_pairs(self) -> bool:
        return True

    def rules(self) -> tuple[Rule, ...]:
        return (
            *super().rules(),
            self.scale_is_given_once,
            self.sparse_part_has_elements,
            self.start_has_a_use,
        )

    def scale_is_given_once(self) -> Iterator[Finding]:
        if self.alpha is not None and self.scale is not None:
            yield Finding(
                ("method", "scale"),
                f"is {self.scale:g}, but method.alpha ({self.alpha:g}) sets it to alpha / rank = "
                f"{self.alpha / self.rank:g}: remove one of them",
            )

    def sparse_part_has_elements(self, architecture: ModelConfig) -> Iterator[Finding]:
        smallest = min(rows * cols for rows, cols in projection_shapes(architecture).values())
        if self.sparsity * smallest < 1:
            yield Finding(
                ("method", "sparsity"),
                f"is {self.sparsity:g}, but must leave the smallest projection ({smallest} "
                f"elements) at least one: write {1 / smallest:.1e} or more",
            )

    def start_has_a_use(self, train: TrainConfig) -> Iterator[Finding]:
        if train.init_from is not None:
            yield Finding(
                ("train", "init_from"),
                f"is {train.init_from}, but method sltrain draws its projections afresh and would "
                "ignore the ones given: remove it, or take a method with a dense weight",
            )
