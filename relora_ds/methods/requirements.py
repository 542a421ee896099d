"""What a method needs of a run, and one check of it before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from relora_ds.config.reading.document import Finding
from relora_ds.config.schema import RunConfig
from relora_ds.optim.matrix import MatrixOptimizer
from relora_ds.parallel.zero import ZeroSettings

_STAGES = frozenset(range(4))


@dataclass(frozen=True)
class Requirements:
    """Properties of a run that a method cannot do without; the default accepts every run."""

    zero_stages: frozenset[int] = _STAGES
    """ZeRO stages that it works at."""
    tensor_parallel: bool = True
    """Whether its projections may be sharded over processes."""
    per_layer_update: bool = True
    """Whether `train.per_layer_update` may update its parameters one by one."""
    optimizers: frozenset[str] | None = None
    """Values of `optimizer.name` that it works with; None for all."""

    def unmet(self, name: str, config: RunConfig, zero_stage: int) -> Iterator[Finding]:
        """What a run does not offer, each with key, value, rule and remedy.

        Args:
            name: the method's, for the messages.
            config: the run.
            zero_stage: of its DeepSpeed file.
        """
        if zero_stage not in self.zero_stages:
            stages = ", ".join(map(str, sorted(self.zero_stages)))
            yield Finding(
                ("deepspeed",),
                f"is {config.deepspeed} with ZeRO stage {zero_stage}, but method {name} works at "
                f"{stages} only: use configs/zero/zero{min(self.zero_stages)}.json",
            )
        if config.parallel.tensor > 1 and not self.tensor_parallel:
            yield Finding(
                ("parallel", "tensor"),
                f"is {config.parallel.tensor}, but method {name} does not share a copy of the "
                "model: write 1",
            )
        if config.train.per_layer_update and not self.per_layer_update:
            yield Finding(
                ("train", "per_layer_update"),
                f"is true, but method {name} updates several parameters together: write false",
            )
        if self.optimizers is not None and config.optimizer.name not in self.optimizers:
            allowed = " or ".join(sorted(self.optimizers))
            yield Finding(
                ("optimizer", "name"),
                f"is {config.optimizer.name}, but method {name} needs {allowed}",
            )


def unmet_by_rules(
    name: str,
    config: RunConfig,
    zero: ZeroSettings,
    rules: Sequence[tuple[torch.Size, MatrixOptimizer]],
) -> Iterator[Finding]:
    """What a run or a method does not offer to matrix-wise optimizers.

    Args:
        name: the method's, for the messages.
        config: the run.
        zero: its ZeRO settings.
        rules: global shape of every parameter that has one, and the optimizer.
    """
    if not rules:
        return
    if config.optimizer.name != "adamw":
        yield Finding(
            ("optimizer", "name"),
            f"is {config.optimizer.name}, but method {name} updates some parameters matrix by "
            "matrix, beside which only adamw works: write adamw",
        )
    if config.train.per_layer_update and any(rule.needs != "pair" for _, rule in rules):
        yield Finding(
            ("train", "per_layer_update"),
            f"is true, but method {name} updates some parameters matrix by matrix, after all "
            "gradients are complete: write false",
        )
    elif config.train.per_layer_update and not config.train.master_weights:
        yield Finding(
            ("train", "master_weights"),
            f"is false, but method {name} updates pairs of factors, which needs fp32 copies of "
            "them: write true",
        )
    if zero.offloads_optimizer:
        yield Finding(
            ("deepspeed",),
            f"is {config.deepspeed} with offload_optimizer, but method {name} updates some "
            "parameters matrix by matrix, with sums that processes exchange on their devices: "
            "remove offload_optimizer",
        )
    pairs = sum(shape.numel() for shape, rule in rules if rule.needs == "pair")
    if zero.stage == 3 and pairs > zero.sub_group:
        yield Finding(
            ("deepspeed",),
            f"is {config.deepspeed} with sub_group_size {zero.sub_group:,}, which may step the two "
            f"factors of a projection apart: write at least {pairs:,}",
        )
    odd = [shape for shape, _ in rules if len(shape) != 2]
    if odd:
        yield Finding(
            ("method", "name"),
            f"is {name}, which asks for a matrix-wise update of a parameter of shape "
            f"{tuple(odd[0])}: it must leave what is no matrix to the element-wise optimizer",
        )
