"""Rules on islands: whatever all of them do together happens at the end of a round."""

from __future__ import annotations

from collections.abc import Iterator

from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.reading.document import Finding, KeyPath
from relora_ds.config.rules.training import multiples_near
from relora_ds.config.sections import (
    CheckpointConfig,
    EvalConfig,
    GuardsConfig,
    ParallelConfig,
    TrainConfig,
)
from relora_ds.config.spread.islands import IslandsConfig


def rounds_need_islands(parallel: ParallelConfig, islands: IslandsConfig) -> Iterator[Finding]:
    if parallel.islands == 1 and islands.every != 1:
        yield Finding(
            ("islands", "every"),
            f"is {islands.every}, but parallel.islands is 1, and one island meets nobody: set "
            "parallel.islands to the number of parts that a slow link connects, or remove it",
        )


def rounds_begin_in_the_run(
    parallel: ParallelConfig, islands: IslandsConfig, train: TrainConfig
) -> Iterator[Finding]:
    path, first = ("islands", "from_step"), islands.from_step
    if not first:
        return
    if parallel.islands == 1:
        yield Finding(
            path,
            f"is {first}, but parallel.islands is 1, and there are no rounds: set parallel.islands "
            "to the number of parts that a slow link connects, or remove it",
        )
    elif islands.share_gradients:
        yield Finding(
            path,
            f"is {first}, but islands share gradients in every update anyway: set islands.every to "
            "the updates of a round, or remove it",
        )
    elif first >= train.steps:
        yield Finding(
            path,
            f"is {first}, but must be less than train.steps ({train.steps}), or no round begins: "
            "write less, or islands.every: 1 to share gradients in every update",
        )


def ramp_leads_to_longer_rounds(
    parallel: ParallelConfig, islands: IslandsConfig, train: TrainConfig
) -> Iterator[Finding]:
    path, every = ("islands", "ramp"), islands.every
    if not islands.ramp:
        return
    if parallel.islands == 1 or islands.share_gradients:
        yield Finding(
            path,
            "is given, but there are no rounds: set parallel.islands and islands.every, or remove "
            "it",
        )
        return
    before = islands.from_step
    for number, (until, shorter) in enumerate(islands.ramp):
        if until % every:
            yield Finding(
                (*path, number, 0),
                f"is {until}, but must be a multiple of islands.every ({every}), where a round "
                f"ends in any case: write {multiples_near(until, every)}",
            )
        elif not before < until < train.steps:
            yield Finding(
                (*path, number, 0),
                f"is {until}, but must lie between {before}, where these rounds begin, and "
                f"train.steps ({train.steps}): write a number between them",
            )
        if shorter >= every:
            yield Finding(
                (*path, number, 1),
                f"is {shorter}, but must be less than islands.every ({every}), to which rounds "
                "grow: write less, or remove the pair",
            )
        before = until


def factors_of_rates_need_rounds(
    parallel: ParallelConfig, islands: IslandsConfig
) -> Iterator[Finding]:
    if islands.inner_lr != 1.0 and (parallel.islands == 1 or islands.share_gradients):
        yield Finding(
            ("islands", "inner_lr"),
            f"is {islands.inner_lr}, but is a factor of learning rates in rounds, and there are "
            "none: set parallel.islands and islands.every, or remove it",
        )


def nesterov_has_momentum(islands: IslandsConfig) -> Iterator[Finding]:
    if islands.outer.nesterov and not islands.outer.momentum:
        yield Finding(
            ("islands", "outer", "nesterov"),
            "is true, but islands.outer.momentum is 0, along which nothing is looked ahead: set "
            "it, 0.9 is usual, or write false",
        )


def fragments_fit_a_round(parallel: ParallelConfig, islands: IslandsConfig) -> Iterator[Finding]:
    every, transport = islands.every, islands.transport
    if parallel.islands == 1:  # a warning says that nothing reads them
        return
    if transport.fragments > every:
        yield Finding(
            ("islands", "transport", "fragments"),
            f"is {transport.fragments}, but each of them leaves after an update of its own, and a "
            f"round has islands.every ({every}): write {every} or less",
        )
    if transport.overlap >= every:
        yield Finding(
            ("islands", "transport", "overlap"),
            f"is {transport.overlap}, but must be less than islands.every ({every}), after which "
            f"the same fragment leaves again: write {every - 1} or less",
        )


def islands_share_the_batch(parallel: ParallelConfig, train: TrainConfig) -> Iterator[Finding]:
    size, total = parallel.islands, train.global_batch_size
    if total % size:
        yield Finding(
            ("train", "global_batch_size"),
            f"is {total}, but must be a multiple of parallel.islands ({size}), which share it "
            f"equally: write {multiples_near(total, size)}",
        )


def steps_end_rounds(
    parallel: ParallelConfig,
    islands: IslandsConfig,
    train: TrainConfig,
    method: MethodSettings,
    eval: EvalConfig,
    checkpoint: CheckpointConfig,
) -> Iterator[Finding]:
    if parallel.islands == 1:
        return
    every, warm = islands.every, method.warm_start
    steps: dict[KeyPath, int | None] = {
        ("train", "steps"): train.steps,
        ("islands", "from_step"): islands.from_step,
        ("method", "warm_start_steps"): warm and warm.steps,
        ("method", "merge_every"): method.merges_every,
        ("method", "update_every"): method.refreshes_every,
        ("eval", "every"): eval.every,
        ("checkpoint", "every"): checkpoint.every,
    }
    for path, value in steps.items():
        if value and value % every:
            yield Finding(
                path,
                f"is {value}, but must be a multiple of islands.every ({every}): weights are "
                "common to all islands at the end of a round only; write "
                f"{multiples_near(value, every)}",
            )


def islands_are_supported(
    parallel: ParallelConfig,
    islands: IslandsConfig,
    train: TrainConfig,
    guards: GuardsConfig,
) -> Iterator[Finding]:
    size = parallel.islands
    if size == 1:
        return
    if train.per_layer_update:
        yield Finding(
            ("train", "per_layer_update"),
            f"is true, but parallel.islands is {size}: gradients are gone before islands could "
            "average them, and masters may be missing; write false",
        )
    if guards.decides_before_update:
        skips = guards.non_finite != "stop"
        key, value = ("non_finite",), guards.non_finite
        if not skips:
            key, value = ("loss_spike", "action"), guards.loss_spike.action
        yield Finding(
            ("guards", *key),
            f"is {value}, but parallel.islands is {size}: all islands would have to agree before "
            f"every update; write {'stop' if skips else 'off'}",
        )


ISLAND_RULES = (
    rounds_need_islands,
    rounds_begin_in_the_run,
    ramp_leads_to_longer_rounds,
    factors_of_rates_need_rounds,
    nesterov_has_momentum,
    fragments_fit_a_round,
    islands_share_the_batch,
    steps_end_rounds,
    islands_are_supported,
)
"""All of them."""
