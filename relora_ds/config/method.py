"""One configuration model per training method; `name` is its key in the registry.

Defaults are the published settings unless a comment says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from relora_ds.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class FullConfig(Section):
    """Full-rank training: every weight is trained. The baseline of every comparison."""

    name: Literal["full"]
    """Registry key."""


class LowRankConfig(Section):
    """Factorised training from scratch: the projection *is* B @ A, there is no dense weight."""

    name: Literal["low_rank"]
    """Registry key."""
    rank: PositiveInt = 128
    """Inner dimension r of the factors; smaller than both sides of every projection."""
    init: Literal["spectral", "xavier"] = "spectral"
    """`spectral`: truncated SVD of the dense draw, singular values split evenly between the
    factors (Khodak et al., 2021). `xavier`: each factor drawn on its own."""


class AdapterConfig(Section):
    """What LoRA and everything built on it share: a frozen W plus scale * B @ A."""

    rank: PositiveInt = 128
    """Rank r of the adapters; smaller than both sides of every projection."""
    alpha: PositiveFloat | None = None
    """Numerator of the adapter scale alpha / rank. Default: 32, or 1 with `init: balanced`."""
    init: Literal["kaiming", "balanced"] = "kaiming"
    """`kaiming`: A uniform on +-1/sqrt(in_features), B zero. `balanced`: both factors non-zero as
    in SwitchLoRA (section 3 of its paper), the base weight absorbs -scale * B @ A."""
    trainable_scaling: bool = False
    """Replace alpha / rank by tanh(sigma) with one trained sigma per projection. It starts at 1 and
    returns to 1 at every restart (the authors' code sets it to 0, which kills the adapter)."""
    warm_start_steps: NonNegativeInt = 0
    """Optimizer steps of full-rank training before the method takes over, within the same run."""
    warm_start_lr: PositiveFloat | None = None
    """Learning rate of the projections during the warm start. Default: `optimizer.lr`."""

    @property
    def scale(self) -> float:
        """alpha / rank with the default alpha of the chosen initialisation."""
        alpha = self.alpha if self.alpha is not None else (1.0 if self.init == "balanced" else 32.0)
        return alpha / self.rank


class LoRAConfig(AdapterConfig):
    """LoRA from scratch: adapters on a frozen base that never changes (Hu et al., 2021)."""

    name: Literal["lora"]
    """Registry key."""


class ResetConfig(Section):
    """What happens to the adapters' Adam moments at a ReLoRA restart."""

    mode: Literal["zero", "random", "magnitude"] = "zero"
    """`zero`: all of them. `random`: each element with probability `fraction`. `magnitude`: the
    `fraction` of each parameter's elements that is smallest, exact over the whole parameter."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share that `random` and `magnitude` prune. Not used by `zero`."""
    joint: bool = True
    """An element keeps its moments only where both survive. `false` is the published form with one
    mask per moment: it leaves first moments without second moments and updates explode."""
    steps: bool = True
    """Restart Adam's bias correction of the adapters together with their moments."""


class ReLoRAConfig(AdapterConfig):
    """ReLoRA: merge the adapters into W and restart them, again and again (Lialin et al., 2023)."""

    name: Literal["relora"]
    """Registry key."""
    merge_every: PositiveInt = 1000
    """Optimizer steps between merges, counted from the start of the ReLoRA phase."""
    restart_warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate ramps up again after a merge; less than `merge_every`."""
    adjust_step: NonNegativeInt = 0
    """Steps by which the restart cycle of the schedule is shifted (the authors' `adjust_step`)."""
    reset: ResetConfig = ResetConfig()
    """What happens to the adapters' optimizer state at a merge."""


class SLTrainConfig(Section):
    """SLTrain: every projection is scale * B @ A plus a sparse matrix on a fixed random support,
    and no dense weight is kept (Han et al., 2024)."""

    name: Literal["sltrain"]
    """Registry key."""
    rank: PositiveInt = 128
    """Inner dimension r of the factors; smaller than both sides of every projection."""
    alpha: PositiveFloat | None = None
    """Numerator of the scale alpha / rank on B @ A. Default: 32. Give this or `scale`."""
    scale: PositiveFloat | None = None
    """The scale itself; the published ones go from 1/4 (60M) to 1/128 (7B)."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Share delta of a projection's elements that the sparse matrix sets and trains."""
    keep_composed: Literal["layer", "step"] = "layer"
    """How long the composed dense weight lives. `layer`: for one matrix product, at the price of
    composing it again in the backward pass. `step`: for all micro-batches of an optimizer step, at
    the price of the dense weights' memory."""
    gradient: Literal["auto", "dense", "low_rank"] = "auto"
    """`dense`: from the dense weight's gradient, which lives for one layer. `low_rank`: products
    with the factors and a sampled product at the support. `auto`: the cheaper one for the shape."""

    @property
    def resolved_scale(self) -> float:
        """The factor on B @ A with its default filled in."""
        if self.scale is not None:
            return self.scale
        return (32.0 if self.alpha is None else self.alpha) / self.rank


class SwitchLoRAConfig(AdapterConfig):
    """SwitchLoRA: replace single vectors of the adapters by candidates, a few at every step, while
    W absorbs the difference (arXiv 2406.06564). Events stop with the last update."""

    name: Literal["switchlora"]
    """Registry key."""
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
    """`random`: any vector, any candidate, none twice before all were used. `ring`: the authors'
    order, in which only 2 of N pairs of candidates ever meet."""
    candidates: Literal["host", "device"] = "host"
    """Where replaced vectors wait: in host memory, one copy per node, or beside the model."""

    @property
    def scale(self) -> float:
        """alpha / rank, alpha being 1 by default whatever the initialisation."""
        return (1.0 if self.alpha is None else self.alpha) / self.rank

    def expected_switches(self, step: int, steps: int) -> float:
        """Vectors of one factor to replace after `step` of `steps` updates, on average.

        rank / interval, falling to 0.3 of itself over `descent_rate` of the steps (the paper's text
        says a third; its code, followed here, 0.3).
        """
        rate = 0.3 ** ((step + 1) / (self.descent_rate * steps))
        return self.rank / self.interval * max(rate, 1e-8)


MethodConfig = Annotated[
    FullConfig | LoRAConfig | LowRankConfig | ReLoRAConfig | SLTrainConfig | SwitchLoRAConfig,
    Field(discriminator="name"),
]
