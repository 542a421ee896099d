"""Rules that belong to one training method: its keys against each other, the model, the optimizer.

See `checks` for how rules are written and applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from relora_ds.config.document import Finding
from relora_ds.config.method import (
    FullConfig,
    MethodConfig,
    ReLoRAConfig,
    SLTrainConfig,
    SwitchLoRAConfig,
)
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig


def restart_warmup_ends(method: MethodConfig) -> Iterator[Finding]:
    if isinstance(method, ReLoRAConfig) and method.restart_warmup_steps >= method.merge_every:
        yield Finding(
            ("method", "restart_warmup_steps"),
            f"is {method.restart_warmup_steps}, but must be less than method.merge_every "
            f"({method.merge_every}), or the learning rate never recovers from a restart",
        )


def warmup_precedes_first_restart(
    method: MethodConfig, schedule: ScheduleConfig
) -> Iterator[Finding]:
    if not isinstance(method, ReLoRAConfig) or not method.adjust_step:
        return
    end = method.adjust_step + schedule.warmup_steps
    if end > method.merge_every:
        yield Finding(
            ("method", "adjust_step"),
            f"is {method.adjust_step}, but adjust_step + schedule.warmup_steps "
            f"({schedule.warmup_steps}) may not exceed method.merge_every ({method.merge_every}): "
            "the warm-up would run into the first restart",
        )


def rank_divides_over_tensor(method: MethodConfig, parallel: ParallelConfig) -> Iterator[Finding]:
    if isinstance(method, FullConfig) or parallel.low_rank_plan != "act":
        return
    if method.rank % parallel.tensor:
        yield Finding(
            ("parallel", "low_rank_plan"),
            f"is act, which cuts method.rank ({method.rank}) into parallel.tensor "
            f"({parallel.tensor}) equal parts: use a multiple of {parallel.tensor} as the rank, or "
            "write fold",
        )


def rank_fits_projections(method: MethodConfig, architecture: ModelConfig) -> Iterator[Finding]:
    if isinstance(method, FullConfig):
        return
    shapes = projection_shapes(architecture)
    name = min(shapes, key=lambda projection: min(shapes[projection]))
    rows, columns = shapes[name]
    if method.rank >= min(rows, columns):
        yield Finding(
            ("method", "rank"),
            f"is {method.rank}, but must be less than both sides of every projection, and {name} "
            f"is {rows} x {columns}: write less than {min(rows, columns)}, "
            "a quarter of the hidden size is usual",
        )


def scale_is_given_once(method: MethodConfig) -> Iterator[Finding]:
    if isinstance(method, SLTrainConfig) and method.alpha is not None and method.scale is not None:
        yield Finding(
            ("method", "scale"),
            f"is {method.scale:g}, but method.alpha ({method.alpha:g}) sets it to alpha / rank = "
            f"{method.alpha / method.rank:g}: remove one of them",
        )


def sparse_part_has_elements(method: MethodConfig, architecture: ModelConfig) -> Iterator[Finding]:
    if not isinstance(method, SLTrainConfig):
        return
    smallest = min(rows * cols for rows, cols in projection_shapes(architecture).values())
    if method.sparsity * smallest < 1:
        yield Finding(
            ("method", "sparsity"),
            f"is {method.sparsity:g}, but must leave the smallest projection ({smallest} elements) "
            f"at least one: write {1 / smallest:.1e} or more",
        )


def start_has_a_use(train: TrainConfig, method: MethodConfig) -> Iterator[Finding]:
    if isinstance(method, SLTrainConfig) and train.init_from is not None:
        yield Finding(
            ("train", "init_from"),
            f"is {train.init_from}, but method sltrain draws its projections afresh and would "
            "ignore the ones given: remove it, or take a method with a dense weight",
        )


def reset_of_steps_has_optimizer(
    method: MethodConfig, optimizer: OptimizerConfig
) -> Iterator[Finding]:
    if isinstance(method, ReLoRAConfig) and method.reset.steps and not is_ours(optimizer):
        yield Finding(
            ("method", "reset", "steps"),
            f"is true, but only optimizer.name adamw counts steps per adapter vector, and it is "
            f"{optimizer.name}: use adamw, or write false to keep the count over restarts",
        )


def pruned_magnitudes_are_stored(
    method: MethodConfig, optimizer: OptimizerConfig
) -> Iterator[Finding]:
    if (
        isinstance(method, ReLoRAConfig)
        and method.reset.mode == "magnitude"
        and optimizer.name == "adamw8bit"
    ):
        yield Finding(
            ("method", "reset", "mode"),
            "is magnitude, but optimizer.name adamw8bit stores codes, whose order is not that of "
            "magnitudes across blocks: use adamw, or write zero or random",
        )


def frozen_vectors_thaw_between_switches(method: MethodConfig) -> Iterator[Finding]:
    if isinstance(method, SwitchLoRAConfig) and method.interval < 2 * method.freeze_steps:
        yield Finding(
            ("method", "interval"),
            f"is {method.interval:g}, but must be at least twice method.freeze_steps "
            f"({method.freeze_steps}), or there are more frozen vectors than vectors: "
            f"write {2 * method.freeze_steps} or more, or shorten the freeze",
        )


def switches_find_vectors(method: MethodConfig, architecture: ModelConfig) -> Iterator[Finding]:
    """An event takes as many vectors of A as of B, of other indices, and as many candidates."""
    if not isinstance(method, SwitchLoRAConfig):
        return
    count = math.ceil(method.rank / method.interval)
    smallest = min(min(shape) for shape in projection_shapes(architecture).values())
    free = min(method.rank // 2, smallest - method.rank)
    if count > free and method.rank < smallest:
        yield Finding(
            ("method", "interval"),
            f"is {method.interval:g}, so that {count} of {method.rank} vectors are replaced at "
            f"once, but only {max(free, 0)} are free: half of method.rank, and method.rank less "
            f"than the shortest side ({smallest}) of a projection, are the limits; lengthen the "
            "interval or change the rank",
        )


def switched_scale_is_fixed(method: MethodConfig) -> Iterator[Finding]:
    if isinstance(method, SwitchLoRAConfig) and method.trainable_scaling:
        yield Finding(
            ("method", "trainable_scaling"),
            "is true, but a switch needs a fixed scale, which W absorbs the difference with: "
            "write false, and choose the scale by method.alpha",
        )


def switches_have_optimizer(method: MethodConfig, optimizer: OptimizerConfig) -> Iterator[Finding]:
    if isinstance(method, SwitchLoRAConfig) and not is_ours(optimizer):
        yield Finding(
            ("optimizer", "name"),
            f"is {optimizer.name}, but only adamw and adamw8bit count steps per adapter vector and "
            "freeze single ones, which a switch needs: use adamw",
        )


def projection_shapes(architecture: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the seven projections of a layer."""
    width, inner = architecture.hidden_size, architecture.intermediate_size
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_key_value_heads * architecture.head_dim
    return {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def is_ours(optimizer: OptimizerConfig) -> bool:
    """Whether the optimizer counts steps per adapter vector."""
    return optimizer.name in ("adamw", "adamw8bit")


METHOD_RULES = (
    restart_warmup_ends,
    warmup_precedes_first_restart,
    rank_fits_projections,
    rank_divides_over_tensor,
    scale_is_given_once,
    sparse_part_has_elements,
    start_has_a_use,
    reset_of_steps_has_optimizer,
    pruned_magnitudes_are_stored,
    frozen_vectors_thaw_between_switches,
    switches_find_vectors,
    switched_scale_is_fixed,
    switches_have_optimizer,
)
