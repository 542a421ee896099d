"""What a contestant costs, in closed form: nothing is run for it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.trials.description import Court
from relora_ds.accounting.flops import flops_per_token
from relora_ds.methods.build import meta_model
from relora_ds.methods.registry import plan_phases
from relora_ds.planning.plan import plan
from relora_ds.planning.results import Cluster


@dataclass(frozen=True)
class Costs:
    """Costs of one contestant. A warm start counts by its share of the updates.

    Args:
        trained: parameters trained by the method itself, after a warm start.
        states_bytes: optimizer moments and masters on one process, after a warm start.
        flops_per_token: of forward and backward pass; the optimizer's own are not counted.
        wire_bytes: sent by a process per update, over `processes` of them.
        processes: data-parallel.
    """

    trained: int
    states_bytes: int
    flops_per_token: float
    wire_bytes: float
    processes: int


def costs_of(court: Court, name: str) -> Costs:
    """Costs of a contestant's run.

    Raises:
        ConfigError: the global batch does not divide over `wire_processes`.
    """
    alone, processes = court.loaded(name), court.config.wire_processes
    batch = alone.config.train.global_batch_size
    # one micro-batch per update wherever that is possible, so that all are compared alike
    micro = min(alone.config.train.micro_batch_size, max(1, batch // processes))
    spread = court.loaded(name, f"train.micro_batch_size={micro}")
    found = plan(spread, Cluster(gpus=processes), compare_sizes=False)
    single = plan(alone, Cluster(gpus=1), compare_sizes=False)
    operations = wire = 0.0
    steps = alone.config.train.steps
    for phase, planned in zip(plan_phases(alone.config), found.phases.values(), strict=True):
        model = meta_model(alone.architecture, phase.method, alone.config.train)
        share = phase.steps / steps
        operations += share * flops_per_token(model, alone.config.train.seq_length)
        wire += share * planned.stages[found.asked.stage].traffic.wire
    last = list(single.phases.values())[-1]
    states = last.stages[single.asked.stage].memory.states
    return Costs(last.trained, states, operations, wire, processes)
