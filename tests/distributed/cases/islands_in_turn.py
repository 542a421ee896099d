"""Fragments that travel between islands in turn, beside islands in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from relora_ds.accounting.islands import end_of_round, fragment_of_round
from relora_ds.accounting.recorder import Traffic
from relora_ds.model.llama import Llama
from relora_ds.parallel.fragments import share_out
from relora_ds.parallel.linear import DenseLinear, LinearSpec, Projection
from relora_ds.parallel.topology import Topology
from tests.distributed.cases.islands import (
    OUTER,
    RANK,
    RATES,
    Island,
    between_islands,
    described,
    groups_of,
    shares,
    spread_over_islands,
)
from tests.harness.build import TINY
from tests.harness.islands_reference import PlainIsland, PlainIslands
from tests.harness.reference import PlainAdamW, PlainAdapter

InTurn = tuple[str, int, int, int, tuple[int, int, int]]
"""Method, ZeRO stage, tensor-parallel size, bits; and of rounds: updates, fragments, overlap."""


def in_turn(
    topology: Topology, cells: list[InTurn], steps: int, ramp: tuple[tuple[int, int], ...] = ()
) -> dict[str, Any]:
    """Two islands whose fragments travel in turn, with a Nesterov step when they arrive.

    Weights are made common for ReLoRA's merge and at the end, and not at the end of other rounds.

    Returns:
        By cell: `losses` of every update, and `plain` ones of the reference, in 32 bits; `error`,
        the largest difference of a weight from the reference's at the end; `differ`, that between
        islands before the end and at it; `bytes`, whether the closed form knows what moved between
        islands in every update.
    """
    found = {}
    for cell in cells:
        method, stage, tensor, bits, (every, fragments, overlap) = cell
        transport = {"bits": bits, "fragments": fragments, "overlap": overlap}
        rounds = {"every": every, "outer": OUTER, "transport": transport, "ramp": ramp}
        config = described(method, 2, tensor=tensor, steps=steps, rounds=rounds)
        run = Island(config, topology, stage, TINY)
        parts = share_out({p: n for n, p in run.named.items() if p.requires_grad}, fragments)
        plain = _plain_islands(run, parts) if bits == 32 else None
        figures: dict[str, Any] = {"losses": [], "plain": [], "bytes": True, "differ": []}
        for step in range(steps):
            last, merged = step == steps - 1, run.session.products_to_merge(step + 1)
            wanted = _expected_traffic(run, parts, step, last)
            if last:
                figures["differ"].append(spread_over_islands(run))
            figures["losses"].append(run.step(step, common=last)[0])
            figures["bytes"] &= between_islands() == wanted
            if plain is not None:
                rates, together = run.set_rates(step, RATES), last or _ends_together(run, step + 1)
                read = shares(run, step)
                figures["plain"].append(plain.step(step, read, rates, together, bool(merged)))
        figures["differ"].append(spread_over_islands(run))
        if plain is not None:
            model = plain.islands[0].model
            figures["error"] = run.difference({n: p.detach() for n, p in model.named_parameters()})
        run.check_replicas()
        run.destroy()
        found["/".join(map(str, cell))] = figures
    return found


def _expected_traffic(
    run: Island, parts: list[list[nn.Parameter]], done: int, last: bool
) -> dict[Traffic, int]:
    """The closed form of what moves between islands in the update after `done` ones."""
    islands, form = run.config.islands, (groups_of(run), run.zero, 2, run.topology.dp_rank)
    bits, found = islands.transport.bits, dict[Traffic, int]()
    products = run.session.products_to_merge(done + 1)
    payloads = [
        fragment_of_round(*form, parts[number], bits)
        for number in (islands.leaving(done) if not _common_after(run, done) else [])
    ]
    if last or products or _ends_together(run, done + 1):
        merged = [factor for product in products for factor in product.factors]
        payloads.append(end_of_round(*form, bits, merged))
    for payload in payloads:
        for traffic, size in payload.items():
            found[traffic] = found.get(traffic, 0) + size
    return found


def _common_after(run: Island, done: int) -> bool:
    merged = bool(run.session.products_to_merge(done))
    return done == 0 or merged or _ends_together(run, done)


def _ends_together(run: Island, done: int) -> bool:
    return run.config.islands.ends_at(done) and run.config.islands.ends_together(done)


def _plain_islands(run: Island, parts: list[list[nn.Parameter]]) -> PlainIslands:
    """The run's islands in plain PyTorch, before their first update."""
    config, names = run.config, {parameter: name for name, parameter in run.named.items()}
    values = dict(zip(run.named, run.gather(list(run.named.values())), strict=True))
    optimizer = config.optimizer
    linear: Callable[[LinearSpec], Projection] = DenseLinear
    if run.layers:
        linear = partial(PlainAdapter, rank=RANK, scale=float(run.layers[0].merge_scale()))
    islands = []
    for _ in range(2):
        model = Llama(TINY, linear)
        model.load_state_dict(values)
        adamw = PlainAdamW(optimizer.betas, optimizer.eps, optimizer.weight_decay)
        islands.append(PlainIsland(model, adamw, optimizer.clip))
    outer, transport = config.islands.outer, config.islands.transport
    return PlainIslands(
        islands,
        config.islands.every,
        transport.overlap,
        [[names[parameter] for parameter in part] for part in parts],
        (outer.lr, outer.momentum, outer.nesterov),
        config.train.seed,
        max((until for until, _ in config.islands.ramp), default=0),
    )
