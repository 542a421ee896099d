"""Islands against plain data parallelism, and what they exchange, on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from relora_ds.accounting.islands import GROUP, end_of_round, shared_gradients
from relora_ds.accounting.recorder import Traffic, recorder
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.parallel.topology import Topology, as_one_island, share_models
from tests.harness.build import BATCH, CUT, SEQUENCE, VOCAB, Training, run_config

MICRO = 1
RATES = {"dense": 8e-3, "adapter": 1.2e-2}
RANK = 4
_RELORA = {"name": "relora", "rank": RANK, "alpha": 6, "merge_every": 4, "restart_warmup_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4, "alpha": 6},
    "low_rank": {"name": "low_rank", "rank": 4},
    "relora": _RELORA,
    "relora_scaled": _RELORA | {"trainable_scaling": True},
    "sltrain": {"name": "sltrain", "rank": 4, "alpha": 6, "sparsity": 0.1},
    # its switches do not fade out within a few updates
    "switchlora": {
        "name": "switchlora",
        "rank": 6,
        "interval": 10,
        "freeze_steps": 2,
        "descent_rate": 10.0,
    },
    "galore": {"name": "galore", "rank": 4, "update_every": 3},
}


def described(
    method: str,
    islands: int,
    *,
    tensor: int = 1,
    steps: int = 8,
    precision: str = "fp32",
    rounds: dict[str, Any] | None = None,
) -> RunConfig:
    """A run of 8 sequences per update, over all islands."""
    config = run_config(
        METHODS[method],
        train={"steps": steps, "micro_batch_size": MICRO, "precision": precision},
        # a small eps turns rounding into updates where a gradient is nearly zero
        optimizer={"eps": 1e-3, "weight_decay": 0.1, "clip": 0.3},
        parallel={"tensor": tensor, "islands": islands},
    )
    values = config.model_dump(mode="json") | {"islands": rounds or {}}
    return RunConfig.model_validate(values, strict=False)


class Island(Training):
    """A run as one of its islands drives it."""

    def __init__(
        self, config: RunConfig, alone: Topology, stage: int, architecture: ModelConfig = CUT
    ) -> None:
        recorder.start()
        topology = share_models(alone, config)
        between = topology.islands.group, topology.islands.background
        for group in between:
            if group is not None:
                recorder.name_group(group, GROUP)
        if topology.tp.group is not None:
            recorder.name_group(topology.tp.group, "tp")
        probe = batch(0)[:1, :-1]
        zero = {"stage": stage}
        super().__init__(as_one_island(config), topology, zero, architecture, probe=probe)
        self.rounds_end = True
        """Whether rounds end by themselves."""

    def own_share(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """This rank's micro-batches of a global batch of all islands."""
        starts = range(
            self.topology.data_rank * MICRO, len(tokens), MICRO * self.topology.data_size
        )
        return [tokens[at : at + MICRO] for at in starts]

    def step(self, step: int, common: bool = True) -> tuple[float, Any]:
        """The update after `step` completed ones, as the loop does it: mean loss, and event."""
        tokens = batch(step)
        self.set_rates(step, RATES)
        self.engine.state.gradients.batch = lambda: self.own_share(tokens)
        recorder.begin_step()
        with recorder.phase("event"):
            self.before_step(step)
        self.engine.begin_update(step)
        loss, _ = self.train_step(self.own_share(tokens))
        if self.rounds_end:
            self.engine.end_round(step + 1, self.session.products_to_merge(step + 1), common)
        return float(distributed.mean_over_ranks(loss)), self.after_step(step + 1)


def losses(
    topology: Topology,
    cells: list[tuple[str, int, int, int]],
    steps: int = 8,
    precision: str = "fp32",
) -> dict[str, list[float]]:
    """Losses of every update, by cell: method, islands, ZeRO stage, tensor-parallel size."""
    found = {}
    for cell in cells:
        method, islands, stage, tensor = cell
        form: dict[str, Any] = {"tensor": tensor, "steps": steps, "precision": precision}
        run = Island(described(method, islands, **form), topology, stage)
        found["/".join(map(str, cell))] = [run.step(step)[0] for step in range(steps)]
        if islands > 1:
            closed = shared_gradients(groups_of(run), run.zero, islands, run.topology.dp_rank)
            assert between_islands() == closed
        run.check_replicas()
        run.destroy()
    return found


def groups_of(run: Island) -> list[list[nn.Parameter]]:
    return [parameters for _, parameters in run.engine.groups]


def between_islands() -> dict[Traffic, int]:
    """Payload of this update between islands, as it was counted."""
    volumes = recorder.step_volumes().items()
    return {kind: volume.payload for kind, volume in volumes if kind.group == GROUP}


def common_weights(topology: Topology, cells: list[tuple[str, int, int, str]]) -> dict[str, Any]:
    """A round of four updates on two islands, at whose end ReLoRA merges.

    Args:
        cells: method, ZeRO stage, tensor-parallel size, precision.

    Returns:
        By cell: `differ`, the largest difference of any weight between islands before and after
        the end of the round, and after the method's hook; `error` of this rank's projections
        against the fp64 mean of what the islands computed with, relative; `drift` and
        `output_drift` of the merge; `bytes`, whether the closed form knows what moved between
        islands at the end of the round.
    """
    found = {}
    for cell in cells:
        method, stage, tensor, precision = cell
        config = described(
            method, 2, tensor=tensor, precision=precision, steps=8, rounds={"every": 4}
        )
        run = Island(config, topology, stage)
        for step in range(3):
            run.step(step)
        tokens = batch(3)
        run.set_rates(3, RATES)
        run.train_step(run.own_share(tokens))
        figures: dict[str, Any] = {"differ": [spread_over_islands(run)]}
        wanted = _mean_projections(run)
        recorder.begin_step()
        run.engine.end_round(4, run.session.products_to_merge(4))
        products = run.session.products_to_merge(4)
        merged = [factor for product in products for factor in product.factors]
        closed = end_of_round(groups_of(run), run.zero, 2, run.topology.dp_rank, merged=merged)
        figures["bytes"] = between_islands() == closed
        figures["differ"].append(spread_over_islands(run))
        event = run.after_step(4)
        figures["differ"].append(spread_over_islands(run))
        pairs = zip(wanted, _projections(run), strict=True)
        figures["error"] = max(float((a - b).norm() / a.norm()) for a, b in pairs)
        if event is not None:
            figures["drift"] = event.function_drift
            figures["output_drift"] = event.details["method/output_drift"]
        run.check_replicas()
        run.destroy()
        found["/".join(map(str, cell))] = figures
    return found


def rounds_apart(topology: Topology, cells: list[tuple[str, int, int, int]]) -> dict[str, Any]:
    """Two rounds of two updates on two islands, with a Nesterov step at the end of each.

    Args:
        cells: method, ZeRO stage, tensor-parallel size, bits.

    Returns:
        By cell: `differ`, the largest difference of any weight between islands at the end; `error`,
        that of this rank's masters against an outer step in fp64, relative to what the round
        moved; `bytes`, whether the closed form knows what moved between islands.
    """
    found = {}
    for cell in cells:
        method, stage, tensor, bits = cell
        rounds = {"every": 2, "outer": OUTER, "transport": {"bits": bits}}
        config = described(method, 2, tensor=tensor, rounds=rounds)
        run, momentum = Island(config, topology, stage), None
        figures: dict[str, Any] = {"error": []}
        for _ in range(2):
            start = _masters(run)
            run.rounds_end = False
            for step in range(2):
                run.step(step)
            wanted, momentum = _outer_step(run, start, momentum)
            recorder.begin_step()
            run.engine.end_round(2, ())
            step_size = (wanted - start).norm()
            figures["error"].append(float((_masters(run) - wanted).norm() / step_size))
            momentum = None if bits < 32 else momentum  # what was left out is in the next round
        closed = end_of_round(groups_of(run), run.zero, 2, run.topology.dp_rank, bits)
        figures["bytes"] = between_islands() == closed
        figures["differ"] = spread_over_islands(run)
        run.check_replicas()
        run.destroy()
        found["/".join(map(str, cell))] = figures
    return found


def begun_together(topology: Topology, cells: list[tuple[str, int]]) -> dict[str, Any]:
    """Twelve updates: four that share gradients, two rounds of two, one of four. ReLoRA merges
    after the fourth and the eighth, and moves nothing in the update that follows.

    Args:
        cells: method, ZeRO stage.

    Returns:
        By cell, a figure per update: `losses`; `differ`, the largest difference of any weight
        between islands after it; `sent`, what moved between islands: `gradients` or `weights` as
        the closed form has them, `merged` with the factors, `nothing` or `else`. `plain`: losses
        without islands.
    """
    found = {}
    for method, stage in cells:
        plain = Island(described(method, 1, steps=12), topology, stage)
        figures: dict[str, Any] = {"plain": [plain.step(step)[0] for step in range(5)]}
        plain.destroy()
        rounds = {"every": 4, "from_step": 4, "ramp": [[8, 2]], "transport": {"bits": 16}}
        config = described(method, 2, steps=12, rounds=rounds)
        run = Island(config, topology, stage)
        what = groups_of(run), run.zero, 2, run.topology.dp_rank
        merged = [p for each in run.session.products_to_merge(8) for p in each.factors]
        forms = {
            "nothing": {},
            "gradients": shared_gradients(*what),
            "weights": end_of_round(*what, bits=16),
            "merged": end_of_round(*what, bits=16, merged=merged),
        }
        figures |= {"losses": [], "differ": [], "sent": []}
        for step in range(12):
            figures["losses"].append(run.step(step)[0])
            sent = between_islands()
            figures["sent"].append(next((n for n, form in forms.items() if form == sent), "else"))
            figures["differ"].append(spread_over_islands(run))
        run.check_replicas()
        run.destroy()
        found[f"{method}/{stage}"] = figures
    return found


def flipped_bits(topology: Topology) -> dict[str, str]:
    """What the product says of a frozen weight whose last bit differs on the second island, within
    a round and at its end, where islands share gradients, and before it was flipped."""
    said = {}
    for every in (1, 2):
        config = described("relora", 2, rounds={"every": every})
        run = Island(config, topology, 2)
        run.step(0)
        said[f"{every}: sound"] = run.desync()
        if run.topology.islands.rank == 1:
            working = run.engine.layout.working(run.layers[0].weight)[1]
            working.view(torch.int32)[0] ^= 1
        said[f"{every}: after one"] = run.desync()
        run.step(1)
        said[f"{every}: after two"] = run.desync()
        run.destroy()
    return said


OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


def _masters(run: Island) -> torch.Tensor:
    """This rank's slices of all masters, fp64."""
    placements = run.engine.layout.placements.values()
    return torch.cat([placement.master().double() for placement in placements])


def _outer_step(
    run: Island, start: torch.Tensor, momentum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the masters should be at the end of a round, and the momentum there."""
    mean = start - _masters(run)
    torch.distributed.all_reduce(mean, group=run.topology.islands.group)
    mean /= run.topology.islands.size
    moved = mean if momentum is None else 0.9 * momentum + mean
    return start - 0.7 * (mean + 0.9 * moved), moved


@torch.no_grad()
def spread_over_islands(run: Island) -> float:
    """Largest difference of any working weight between the islands. A collective call."""
    flat = torch.cat([weight.flatten() for weight in run.gather(list(run.named.values()))])
    low, high = flat.clone(), flat.clone()
    group = run.topology.islands.group
    torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN, group=group)
    torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX, group=group)
    return float((high - low).max())


@torch.no_grad()
def _projections(run: Island) -> list[torch.Tensor]:
    """What this rank's part of every adapted projection amounts to, fp64."""
    dense = []
    for layer in run.layers:
        parts = run.engine.state.weights.gather([layer.lora_B, layer.lora_A])
        left, right = (part.double() for part in parts)
        base = run.engine.bases.get(layer.weight)
        start, working = run.engine.layout.working(layer.weight)
        weight = working if base is None else base.load(working, 0)
        product = (left @ right * float(layer.merge_scale())).reshape(-1)
        dense.append(weight.double() + product[start : start + working.numel()])
    return dense


def _mean_projections(run: Island) -> list[torch.Tensor]:
    means = _projections(run)
    for mean in means:
        torch.distributed.all_reduce(mean, group=run.topology.islands.group)
    return [mean / run.topology.islands.size for mean in means]


def batch(step: int) -> torch.Tensor:
    """The global batch of an update: one of two in turn, which are learnt by heart."""
    draw = torch.Generator().manual_seed(step % 2)
    return torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=draw)


def shares(run: Island, step: int) -> list[torch.Tensor]:
    """What each of two islands reads of the global batch of an update."""
    copies, tokens = run.topology.data_size, batch(step)
    return [
        torch.cat([tokens[rank::copies] for rank in ranks])
        for ranks in (range(copies // 2), range(copies // 2, copies))
    ]
