"""SwitchLoRA on two islands that train apart, beside islands in plain PyTorch."""

from __future__ import annotations

from typing import Any

from relora_ds.accounting.islands import end_of_round
from relora_ds.config.methods.switchlora import SwitchLoRAConfig
from relora_ds.config.schema import RunConfig
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.topology import Topology
from tests.distributed.cases.islands import (
    OUTER,
    RATES,
    Island,
    between_islands,
    described,
    groups_of,
    shares,
    spread_over_islands,
)
from tests.harness.build import TINY
from tests.harness.islands_reference import PlainIslands, PlainSwitchingIsland
from tests.harness.reference import PlainAdamW, PlainAdapter
from tests.harness.switchlora_reference import PlainSwitchLoRA

Switching = tuple[int, int, int]
"""ZeRO stage, tensor-parallel size, bits."""


def switching(topology: Topology, cells: list[Switching], steps: int) -> dict[str, Any]:
    """Rounds of two updates until four are done, and of four; a Nesterov step at their ends.

    Returns:
        By cell, a figure per update: `differ`, the largest difference of any weight between islands
        after it; `losses`, and `plain` ones of the reference, which sends 32 bits. `error`: the
        largest difference of a weight from the reference's at the end, where no model is shared.
        `switched`: vectors that were replaced, here and in the reference. `drift` of the switches.
        `bytes`: whether the closed form knows what moved between islands in every update.
    """
    found = {}
    for cell in cells:
        stage, tensor, bits = cell
        transport = {"bits": bits}
        rounds = {"every": 4, "ramp": [[4, 2]], "outer": OUTER, "transport": transport}
        config = described("switchlora", 2, tensor=tensor, steps=steps, rounds=rounds)
        run = Island(config, topology, stage, TINY)
        plain = _plain_islands(config)
        closed = end_of_round(groups_of(run), run.zero, 2, run.topology.dp_rank, bits)
        figures: dict[str, Any] = {"losses": [], "plain": [], "bytes": True, "differ": []}
        for step in range(steps):
            figures["losses"].append(run.step(step)[0])
            ends = config.islands.ends_at(step + 1)
            figures["bytes"] &= between_islands() == (closed if ends else {})
            figures["differ"].append(spread_over_islands(run))
            run.check_replicas("switch")
            if step and config.islands.ends_at(step):
                plain.switch(step, config.islands.round_ending(step))
            rates = run.set_rates(step, RATES)
            figures["plain"].append(plain.step(step, shares(run, step), rates, ends, False))
        metrics, island = run.metrics(), plain.islands[0]
        assert isinstance(island, PlainSwitchingIsland)
        figures["drift"] = metrics["method/function_drift"]
        figures["switched"] = metrics["method/switched_vectors"], island.plain.switched
        if tensor == 1:
            expected = {name: p.detach() for name, p in island.model.named_parameters()}
            figures["error"] = run.difference(expected)
        run.destroy()
        found["/".join(map(str, cell))] = figures
    return found


def _plain_islands(config: RunConfig) -> PlainIslands:
    """The run's islands in plain PyTorch, before their first update."""
    method, optimizer, train = config.method, config.optimizer, config.train
    assert isinstance(method, SwitchLoRAConfig)
    scale, rank = method.scale, method.rank
    islands = []
    for _ in range(2):
        model = Llama(TINY, lambda spec: PlainAdapter(spec, rank, scale))
        draw = InitialWeights(TINY, train.seed)
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data.copy_(draw(name, tuple(parameter.shape)))
        settings = optimizer.clip, optimizer.eps, optimizer.weight_decay, optimizer.betas
        plain = PlainSwitchLoRA(model, method, train.seed, train.steps, {}, *settings)
        adamw = PlainAdamW(optimizer.betas, optimizer.eps, optimizer.weight_decay)
        islands.append(PlainSwitchingIsland(model, adamw, optimizer.clip, plain))
    outer = config.islands.outer
    return PlainIslands(
        islands,
        config.islands.every,
        overlap=0,
        fragments=[],
        outer=(outer.lr, outer.momentum, outer.nesterov),
        seed=train.seed,
    )
