"""Rules on settings that nobody reads, because what they are of is off."""

from __future__ import annotations

from collections.abc import Iterator

from relora_ds.config.base import Section
from relora_ds.config.reading.document import Finding, KeyPath
from relora_ds.config.sections import (
    GuardsConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
)
from relora_ds.config.spread.islands import IslandsConfig


def optimizers_of_matrices_are_chosen(optimizer: OptimizerConfig) -> Iterator[Finding]:
    for owner, kind in (("matrix", "muon"), ("matrix", "scale"), ("adapter", "spectral")):
        chosen = getattr(optimizer, owner)
        if chosen == kind:
            continue
        for key in _changed(getattr(optimizer, kind), ("optimizer", kind)):
            yield Finding(
                key,
                f"has no effect: optimizer.{owner} is {chosen or 'not given'}; write "
                f"optimizer.{owner}: {kind}, or remove the key",
            )


def islands_have_a_transport(parallel: ParallelConfig, islands: IslandsConfig) -> Iterator[Finding]:
    if parallel.islands == 1:
        for part in ("outer", "transport"):
            for key in _changed(getattr(islands, part), ("islands", part)):
                yield Finding(
                    key,
                    "has no effect: parallel.islands is 1, and one island meets nobody; set it, or "
                    "remove the key",
                )
    elif islands.transport.bits == 32 and not islands.transport.error_feedback:
        yield Finding(
            ("islands", "transport", "error_feedback"),
            "has no effect: islands.transport.bits is 32, which rounds nothing",
        )


def spikes_are_looked_for(guards: GuardsConfig) -> Iterator[Finding]:
    if guards.loss_spike.action == "off":
        for key in _changed(guards.loss_spike, ("guards", "loss_spike")):
            yield Finding(
                key, "has no effect: guards.loss_spike.action is off; write warn, or remove the key"
            )


def a_rate_that_stays_has_no_end(schedule: ScheduleConfig) -> Iterator[Finding]:
    if schedule.name == "constant":
        for key in _changed(schedule, ("schedule",)):
            if key[-1] == "min_lr_ratio":
                yield Finding(key, "has no effect: schedule.name is constant, which never falls")


def _changed(section: Section, path: KeyPath) -> Iterator[KeyPath]:
    """Keys of a section that differ from their defaults; a default that is written out is none."""
    for name, field in type(section).model_fields.items():
        if getattr(section, name) != field.default:
            yield (*path, name)


UNUSED_RULES = (
    optimizers_of_matrices_are_chosen,
    islands_have_a_transport,
    spikes_are_looked_for,
    a_rate_that_stays_has_no_end,
)
"""All of them."""
