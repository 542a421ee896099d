"""What islands send each other, how long that takes, and how long a round should be.

Bytes are the closed forms of `accounting.islands`, added up over the ranks of an island, which
share its link. Time is a model: an exchange passes every island's link, round after round of a
ring. Nothing is computed meanwhile, but for the updates during which a fragment may travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from operator import mul
from typing import Any

from torch import nn

from relora_ds.accounting.islands import (
    end_of_round,
    fragment_of_round,
    refresh,
    shared_gradients,
)
from relora_ds.accounting.zero_traffic import Payloads, bytes_of
from relora_ds.config.load import LoadedRun, check_processes
from relora_ds.config.schema import RunConfig
from relora_ds.config.spread.islands import IslandsConfig
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.errors import ConfigError
from relora_ds.methods.interface import Method, optimizer_groups
from relora_ds.methods.registry import Phase, plan_phases
from relora_ds.model.init import dense_shapes
from relora_ds.parallel.fragments import share_out
from relora_ds.parallel.topology import as_one_island, copies_of_island, part_of_model
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.memory_report import largest_part
from relora_ds.planning.plan import plan
from relora_ds.planning.results import Cluster, IslandLink, IslandsPlan, Plan, Round

_EVERY = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000)
"""Lengths of rounds that are compared."""
_GOOD = 0.9
"""Share of the local speed that a round should keep."""
_BF16 = 2


def plan_islands(
    loaded: LoadedRun, cluster: Cluster, link: IslandLink
) -> tuple[Plan, dict[str, IslandsPlan]]:
    """The plan of one island, and what passes between islands in each phase by name.

    Args:
        loaded: the run, with its `parallel.islands`.
        cluster: of the whole job.
        link: what connects an island with the others.

    Raises:
        ConfigError: processes or the batch cannot be shared out equally.
    """
    config = loaded.config
    count, tensor = config.parallel.islands, config.parallel.tensor
    if cluster.gpus % (count * tensor):
        raise ConfigError(
            f"--gpus {cluster.gpus} must be a multiple of parallel.islands ({count}) x "
            f"parallel.tensor ({tensor})"
        )
    copies = copies_of_island(cluster.gpus // tensor, count)
    check_processes(loaded, copies * count)
    share = replace(loaded, config=as_one_island(config))
    found = plan(share, replace(cluster, gpus=cluster.gpus // count), compare_sizes=False)
    zero = resolve_deepspeed_config(config.deepspeed, share.config, copies)
    rounds = {}
    for phase in plan_phases(config):
        stage = found.phases[phase.name].stages[found.asked.stage]
        exchange = _Exchange(loaded, phase.method, zero)
        rounds[phase.name] = _plan(config, phase, exchange, link, stage.seconds.serial)
    return found, rounds


class _Exchange:
    """What one island sends, with all of its ranks."""

    def __init__(self, loaded: LoadedRun, method: Method[Any], zero: ZeroSettings) -> None:
        config = loaded.config
        self._islands, self._zero = config.parallel.islands, zero
        self._tensor, self._bits = config.parallel.tensor, config.islands.transport.bits
        model = largest_part(
            loaded.architecture, method, config.train, part_of_model(config.parallel)
        )
        groups = optimizer_groups(method, config.optimizer, model)
        self._groups: Sequence[Sequence[nn.Parameter]] = [group.parameters for group in groups]
        edited = method.edited_weights(model)
        self._chosen_by = edited if config.method.refreshes_every else []
        merged = {id(weight) for weight in edited if config.method.merges_every}
        self._factors = [
            parameter
            for module in model.modules()
            if merged & {id(p) for p in module.parameters(recurse=False)}
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        ]
        self._known: dict[int, list[float]] = {}
        self._trained = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.dense_parameters = sum(map(prod, dense_shapes(loaded.architecture).values()))

    def gradients(self) -> float:
        """Bytes per update whose gradients are shared."""
        return self._over_ranks(
            shared_gradients(self._groups, self._zero, self._islands, rank)
            for rank in range(self._zero.dp_size)
        )

    @cached_property
    def plain(self) -> float:
        """Bytes at the end of a round."""
        return self._round(())

    @cached_property
    def merged(self) -> float:
        """Bytes at the end of a round before a merge."""
        return self._round(self._factors)

    def _round(self, merged: Sequence[nn.Parameter]) -> float:
        return self._over_ranks(
            end_of_round(self._groups, self._zero, self._islands, rank, self._bits, merged)
            for rank in range(self._zero.dp_size)
        )

    def seconds(self, sent: float, link: IslandLink, times: int = 1) -> float:
        """How long so many exchanges take that send so many bytes together."""
        return sent / link.bandwidth + times * 2 * (self._islands - 1) * link.latency

    def refresh(self) -> tuple[float, int]:
        """Bytes of the dense gradients that a method chooses by, and how many of them a rank
        exchanges one after the other; zeros for a method that does not."""
        sent = self._over_ranks(
            refresh(self._chosen_by, self._zero, self._islands, rank)
            for rank in range(self._zero.dp_size)
        )
        return sent, -(-len(self._chosen_by) // self._zero.dp_size)

    def fragments(self, count: int) -> list[float]:
        """Bytes of each of so many fragments."""
        if count not in self._known:
            self._known[count] = [
                self._over_ranks(
                    fragment_of_round(
                        self._groups, self._zero, self._islands, rank, fragment, self._bits
                    )
                    for rank in range(self._zero.dp_size)
                )
                for fragment in share_out(self._trained, count)
            ]
        return self._known[count]

    def _over_ranks(self, payloads: Iterable[Payloads]) -> float:
        return self._tensor * sum(bytes_of(each).wire for each in payloads)


def _plan(
    config: RunConfig, phase: Phase, exchange: _Exchange, link: IslandLink, local: float
) -> IslandsPlan:
    count, transport = config.parallel.islands, config.islands.transport
    dense = _BF16 * exchange.dense_parameters * 2 * (count - 1) / count
    together = min(max(config.islands.from_step - phase.first_step, 0), phase.steps) / phase.steps
    gradients = exchange.gradients()
    refreshed, turns = exchange.refresh()
    often = 1 / (config.method.refreshes_every or 1)

    def of(every: int) -> Round:
        if every == 1 and config.islands.share_gradients:
            sent, waited = gradients, exchange.seconds(gradients, link)
        else:
            of_round = _apart(config, phase, exchange, link, local, every)
            more = config.islands.ramp_ends(phase.first_step, phase.last_step, every) / phase.steps
            alone = (1 - together) / every
            sent = together * gradients + alone * of_round[0] + more * exchange.plain
            waited = together * exchange.seconds(gradients, link) + alone * of_round[1]
            waited += more * exchange.seconds(exchange.plain, link)
        sent += often * refreshed
        waited += often * exchange.seconds(refreshed, link, turns)
        spent = local + waited
        return Round(every, sent, spent, local / spent, dense / sent)

    rounds = [of(every) for every in sorted({*_EVERY, config.islands.every})]
    return IslandsPlan(
        islands=count,
        bits=transport.bits,
        round_bytes=exchange.plain,
        fragments=transport.fragments,
        fragment_bytes=max(exchange.fragments(transport.fragments)),
        overlap=transport.overlap,
        merge_bytes=exchange.merged - exchange.plain,
        refresh_bytes=refreshed,
        dense_bytes=dense,
        local_seconds=local,
        dense_seconds=local + exchange.seconds(dense, link),
        rounds=rounds,
        asked=of(config.islands.every),
        best=next((each.every for each in rounds if each.speed >= _GOOD), None),
    )


def _apart(
    config: RunConfig,
    phase: Phase,
    exchange: _Exchange,
    link: IslandLink,
    local: float,
    every: int,
) -> tuple[float, float]:
    """Bytes and seconds of waiting in a round of so many updates."""
    plain, islands, factors = exchange.plain, _shortened(config.islands, every), 0.0
    merges = config.method.merges_every
    if merges is not None and merges >= every:
        factors = (exchange.merged - plain) * every / merges
    if not islands.in_turn:
        return plain + factors, exchange.seconds(plain + factors, link)
    at_once = _ends_at_once(config, phase, every)
    travelling = exchange.fragments(islands.transport.fragments)
    hidden = islands.transport.overlap * local
    late = [max(0.0, exchange.seconds(each, link) - hidden) for each in travelling]
    # the first one does not leave where all have just met
    times = [1 - at_once, *(1.0 for _ in travelling[1:])]
    sent = at_once * plain + factors + sum(map(mul, times, travelling))
    waited = at_once * exchange.seconds(plain, link) + factors / link.bandwidth
    waited += sum(map(mul, times, late))
    # nobody sends more than the link carries
    return sent, max(waited, sent / link.bandwidth - every * local)


def _shortened(islands: IslandsConfig, every: int) -> IslandsConfig:
    """The same with rounds of another length, with as many fragments and as much overlap as fit."""
    transport = islands.transport
    fitting = {
        "fragments": min(transport.fragments, every),
        "overlap": min(transport.overlap, every - 1),
    }
    return islands.model_copy(
        update={"every": every, "transport": transport.model_copy(update=fitting)}
    )


def _ends_at_once(config: RunConfig, phase: Phase, every: int) -> float:
    """Share of the rounds of a phase that end with common weights: with a merge, a refresh, an
    evaluation, a checkpoint, or the phase."""
    ends = range(phase.first_step + every, phase.last_step + 1, every)
    due = [
        each
        for each in (
            config.eval.every,
            config.checkpoint.every,
            config.method.merges_every,
            config.method.refreshes_every,
        )
        if each
    ]
    common = sum(end == phase.last_step or any(end % each == 0 for each in due) for end in ends)
    return common / max(1, len(ends))
