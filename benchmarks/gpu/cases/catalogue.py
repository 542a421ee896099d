"""All cases, by stage and by what the report is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.case import Case
from benchmarks.gpu.cases import (
    engine,
    failures,
    kernels,
    memory,
    model,
    preflight,
    ranks,
    speed,
    syncs,
)


@dataclass(frozen=True)
class Stage:
    """A part of the report.

    Args:
        title: what it is about.
        verb: the call that runs it, ``checks`` or ``speed``.
        share: of the call's budget.
        cases: its cases, from whether they are to be tiny.
    """

    title: str
    verb: str
    share: float
    cases: Callable[[bool], list[Case]]


STAGES = {
    "A": Stage("preflight", "checks", 0.10, preflight.cases),
    "B": Stage("kernels", "checks", 0.15, kernels.cases),
    "C": Stage("model", "checks", 0.15, model.cases),
    "D": Stage("engine on one rank", "checks", 0.45, engine.cases),
    "E": Stage("two ranks on one device", "checks", 0.35, ranks.cases),
    "F": Stage("host syncs", "checks", 0.15, syncs.cases),
    "G": Stage("failures", "checks", 0.25, failures.cases),
    "H": Stage("profile", "speed", 0.30, speed.profile_cases),
    "I": Stage("speed", "speed", 0.60, speed.cases),
    "J": Stage("memory", "speed", 0.25, memory.cases),
}
"""Shares add up to more than one: what a stage does not use is the others', in their order."""


def cases_of(verb: str, tiny: bool) -> list[Case]:
    """The cases of ``checks``, ``speed`` or ``all``."""
    wanted = [stage for stage in STAGES.values() if verb in ("all", stage.verb)]
    return [case for stage in wanted for case in stage.cases(tiny)]
