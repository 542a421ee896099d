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


MethodConfig = Annotated[
    FullConfig | LoRAConfig | LowRankConfig | ReLoRAConfig, Field(discriminator="name")
]
