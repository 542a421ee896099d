"""GaLore on two islands that train apart, beside islands in plain PyTorch with whole matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from relora_ds.accounting.islands import end_of_round, refresh
from relora_ds.accounting.recorder import Traffic
from relora_ds.config.schema import RunConfig
from relora_ds.methods.galore.galore import galore_layers
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.linear import DenseLinear
from relora_ds.parallel.topology import Topology
from tests.distributed.cases.galore import PlainGaLore, dense_weights
from tests.distributed.cases.islands import (
    MICRO,
    OUTER,
    RATES,
    Island,
    between_islands,
    groups_of,
    shares,
    spread_over_islands,
)
from tests.harness.build import TINY, run_config
from tests.harness.islands_reference import PlainIsland, PlainIslands, Values
from tests.harness.reference import PlainAdamW

STEPS, EVERY = 14, 4
Refreshing = tuple[int, int, int]
"""ZeRO stage, tensor-parallel size, bits."""


@dataclass
class PlainGaLoreIsland(PlainIsland):
    """One island; its weights are whole, and so is what it exchanges of them."""

    updates: dict[str, PlainGaLore]
    whole: Values = field(default_factory=dict)
    """Gradients that choose the bases, where they are chosen."""

    def gradients(self, tokens: torch.Tensor) -> float:
        """Those of its share; returns the loss."""
        self.model.zero_grad()
        logits = self.model.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return float(loss)

    def train(self, tokens: torch.Tensor, rates: Mapping[str, float]) -> float:
        loss = self.gradients(tokens)
        for name, parameter in self.trained().items():
            if name in self.updates:
                assert parameter.grad is not None
                moved = self.updates[name].direction(parameter.grad, self.whole.get(name))
                parameter.data.sub_(rates["adapter"] * moved)
            else:
                self.optimizer.update(parameter, rates["dense"])
        return loss


class _Reference(PlainIslands):
    """Islands that choose their bases from the gradient of the whole batch."""

    def refresh(self, shares: list[torch.Tensor]) -> None:
        """Choose anew in the coming update; the outer momentum of what is projected is void."""
        means: Values = {}
        for island, share in zip(self.islands, shares, strict=True):
            assert isinstance(island, PlainGaLoreIsland)
            island.gradients(share)
            for name in island.updates:
                grad = island.trained()[name].grad
                assert grad is not None
                means[name] = means.get(name, 0) + grad / len(self.islands)
        for island in self.islands:
            assert isinstance(island, PlainGaLoreIsland)
            island.whole = means
        for name in means:
            self.momentum.pop(name, None)


def refreshing(
    topology: Topology, cells: list[Refreshing], fragments: int = 1, overlap: int = 0
) -> dict[str, Any]:
    """Rounds of four updates with a Nesterov step at their ends, of which every other one is
    followed by a refresh.

    Returns:
        By cell: `losses` of every update, and `plain` ones of the reference, in 32 bits without
        fragments; `error`, the largest difference of a dense weight of the projections from the
        reference's at the end, where no model is shared. `common`: updates after which no weight
        differs between islands. `refreshed`: updates before which bases were chosen. `bytes`:
        whether the closed form knows what moved between islands in every update.
    """
    found = {}
    for cell in cells:
        stage, tensor, bits = cell
        transport = {"bits": bits, "fragments": fragments, "overlap": overlap}
        config = _config(tensor, {"every": EVERY, "outer": OUTER, "transport": transport})
        run, plain = Island(config, topology, stage, TINY), _plain_islands(config)
        figures: dict[str, Any] = {key: [] for key in ("losses", "plain", "common", "refreshed")}
        figures["bytes"] = True
        for step in range(STEPS):
            chosen = _bases(run)
            refreshes, ends = step % (2 * EVERY) == 0, (step + 1) % EVERY == 0
            figures["losses"].append(run.step(step, (step + 1) % (2 * EVERY) == 0)[0])
            moved = between_islands()
            if not torch.equal(chosen, _bases(run)):
                figures["refreshed"].append(step)
            if spread_over_islands(run) == 0.0:
                figures["common"].append(step + 1)
            run.check_replicas("refresh")
            if fragments == 1 and not overlap:
                figures["bytes"] &= moved == _expected(run, bits, refreshes, ends)
                read = shares(run, step)
                if refreshes:
                    plain.refresh(read)
                loss = plain.step(step, read, run.set_rates(step, RATES), ends, False)
                figures["plain"].append(loss)
        weights = dict(plain.islands[0].model.named_parameters())
        if tensor == 1:
            names = {parameter: name for name, parameter in run.named.items()}
            figures["error"] = max(
                float((value - weights[names[weight]]).abs().max())
                for weight, value in dense_weights(run).items()
            )
        run.destroy()
        found["/".join(map(str, cell))] = figures
    return found


def _config(tensor: int, rounds: dict[str, Any]) -> RunConfig:
    config = run_config(
        {"name": "galore", "rank": 3, "update_every": 2 * EVERY},
        train={"steps": STEPS, "micro_batch_size": MICRO},
        optimizer={"eps": 1e-3, "clip": 0.0},
        schedule={"name": "constant"},
        parallel={"tensor": tensor, "islands": 2},
    )
    values = config.model_dump(mode="json") | {"islands": rounds}
    return RunConfig.model_validate(values, strict=False)


def _bases(run: Island) -> torch.Tensor:
    layers = galore_layers(run.engine.model).values()
    return torch.cat([basis.flatten() for basis in run.gather([each.basis for each in layers])])


def _expected(run: Island, bits: int, refreshes: bool, ends: bool) -> dict[Traffic, int]:
    found: dict[Traffic, int] = {}
    if refreshes:
        weights = [layer.weight for layer in galore_layers(run.engine.model).values()]
        found |= refresh(weights, run.zero, 2, run.topology.dp_rank)
    if ends:
        found |= end_of_round(groups_of(run), run.zero, 2, run.topology.dp_rank, bits)
    return found


def _plain_islands(config: RunConfig) -> _Reference:
    """The run's islands in plain PyTorch, before their first update."""
    optimizer, islands = config.optimizer, []
    for _ in range(2):
        model = Llama(TINY, DenseLinear)
        draw = InitialWeights(TINY, config.train.seed)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
        names = [name for name, _ in model.named_parameters() if "_proj.weight" in name]
        updates = {name: PlainGaLore("rotate", "shorter", 2 * EVERY) for name in names}
        adamw = PlainAdamW(optimizer.betas, optimizer.eps, 0.0)
        islands.append(PlainGaLoreIsland(model, adamw, 0.0, updates))
    outer = config.islands.outer
    return _Reference(
        islands,
        EVERY,
        overlap=0,
        fragments=[],
        outer=(outer.lr, outer.momentum, outer.nesterov),
        seed=config.train.seed,
    )
