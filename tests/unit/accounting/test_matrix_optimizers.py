"""What matrix-wise optimizers keep and exchange, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from relora_ds.accounting.matrix_traffic import (
    NOTHING,
    GroupExchange,
    MatrixTraffic,
    Place,
    matrix_traffic,
)
from relora_ds.accounting.memory.model import StoragePlan, matrix_state, state_bytes
from relora_ds.accounting.recorder import Traffic
from relora_ds.accounting.zero_traffic import Payloads, expected_payloads
from relora_ds.config.load import load_run_config
from relora_ds.config.sections import OptimizerConfig
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.methods.full import Full
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.model.init import EMBEDDING, HEAD
from relora_ds.optim.matrix import (
    Exchanged,
    MatrixOptimizer,
    MatrixUpdate,
    Needs,
    StateTensor,
    Steps,
)
from relora_ds.optim.matrix_wise.muon import Muon
from relora_ds.optim.matrix_wise.spectral import SpectralPair
from relora_ds.parallel.shape import TPShard, apply_shard, global_shape
from relora_ds.parallel.topology import part_of_model
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.estimate import PhaseEstimator
from relora_ds.planning.memory_report import largest_part
from relora_ds.planning.results import Cluster, Estimate

ROOT = Path(__file__).parents[3]
WIDTH = 3


@dataclass(frozen=True)
class Projected(MatrixOptimizer):
    """A momentum (k, n) on an owner, a norm of every row on all, a bf16 number per element."""

    needs: ClassVar[Needs] = "rows"

    def state(self, shape: torch.Size) -> Mapping[str, StateTensor]:
        return {
            "momentum": StateTensor(torch.Size((WIDTH, shape[1])), "owner"),
            "norms": StateTensor(shape[:1], "everyone"),
            "average": StateTensor(shape, "slice", torch.bfloat16),
        }

    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        return Exchanged(sums=sum(WIDTH * shape[1] for shape in shapes))

    def update(self, matrices: Sequence[MatrixUpdate]) -> Steps:
        raise AssertionError("closed forms update nothing")


class Pairs(Projected):
    """Both factors of a projection share one sum (r, r)."""

    needs: ClassVar[Needs] = "pair"

    def exchanged(self, shapes: Sequence[torch.Size]) -> Exchanged:
        lora_a, lora_b = shapes
        assert lora_a[0] == lora_b[1]
        return Exchanged(sums=lora_a[0] ** 2)


def _of_layer(parameter: nn.Parameter) -> MatrixOptimizer | None:
    return Projected() if len(global_shape(parameter)) == 2 else None


class ProjectedFull(Full):
    """Full-rank training with `Projected` for projections."""

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        return None if name in (EMBEDDING, HEAD) else _of_layer(parameter)


def matrix(rows: int, cols: int, tensor: int = 1) -> nn.Parameter:
    """Without memory; of several tensor-parallel ranks, the first one's rows."""
    parameter = nn.Parameter(torch.empty(rows, cols, device="meta"))
    if tensor > 1:
        apply_shard(parameter, TPShard(parameter.shape, 0, range(rows // tensor)))
    return parameter


def test_one_process_holds_all_of_a_matrix_state() -> None:
    rule, weight = Projected(), matrix(8, 5)
    held = list(matrix_state(weight, rule))
    assert held == [(WIDTH * 5, 4), (8, 4), (8 * 5, 2)]
    assert sum(elements for elements, _ in held) == rule.state_elements(weight.shape)


def test_slices_and_owners_share_it_and_everyone_does_not() -> None:
    rule = Projected()
    assert list(matrix_state(matrix(8, 5), rule, slices=4, tensor=2)) == [
        (WIDTH * 5 / 4, 4),
        (8, 4),
        (8 * 5 / 4, 2),
    ]
    # one of the 4 x 2 ranks that hold parts of a sharded matrix owns it
    assert list(matrix_state(matrix(8, 5, tensor=2), rule, slices=4, tensor=2)) == [
        (WIDTH * 5 / 8, 4),
        (8, 4),
        (8 * 5 / 8, 2),
    ]


@pytest.mark.parametrize(("stage", "slices"), [(0, 1), (1, 4), (3, 4)])
def test_masters_are_as_before_and_other_groups_keep_two_moments(stage: int, slices: int) -> None:
    plan = StoragePlan(working=2, master=4, moment=4, stage=stage, dp_size=4)
    ruled, vector = matrix(8, 4), nn.Parameter(torch.empty(12, device="meta"))
    found = state_bytes(plan, [ruled, vector], {ruled: Projected()})
    state = 4 * WIDTH * 4 / slices + 4 * 8 + 2 * 32 / slices
    assert found == 4 * (32 + 12) / slices + 2 * 4 * 12 / slices + state


def exchanged(
    model: nn.Module,
    rules: Mapping[nn.Parameter, MatrixOptimizer],
    stage: int = 1,
    sizes: tuple[int, int] = (1, 1),
    place: Place | None = None,
) -> MatrixTraffic:
    """By one process, with all ruled matrices in one optimizer group."""
    return matrix_traffic(model, [list(rules)], rules, ZeroSettings(stage), sizes, place or Place())


def test_sums_are_asked_for_by_the_matrix_or_by_the_pair() -> None:
    model = nn.Module()
    model.whole, model.sharded, model.free = matrix(8, 5), matrix(6, 4, tensor=2), matrix(2, 2)
    rule = Projected()
    found = exchanged(model, {model.whole: rule, model.sharded: rule})
    assert (found.sliced.sums, found.sharded.sums) == (WIDTH * (5 + 4), WIDTH * 4)
    model = nn.Module()
    model.lora_A, model.lora_B = matrix(2, 5), matrix(7, 2)
    pairs = nn.ModuleDict({"layer": model})
    rule = Pairs()
    found = exchanged(pairs, {model.lora_A: rule, model.lora_B: rule})
    assert (found.sliced.sums, found.sharded.sums) == (4, 0)


def test_flat_groups_leave_most_matrices_whole() -> None:
    model = nn.Module()
    model.first, model.cut, model.last = matrix(4, 4), matrix(6, 4), matrix(4, 4)
    rules = dict.fromkeys(model.parameters(), Muon())
    # 56 elements in two parts of 28: `cut` has 12 in either
    moved = [exchanged(model, rules, 1, (2, 1), Place(rank)).sliced for rank in range(2)]
    assert moved == [GroupExchange(0, 12, 12)] * 2
    assert exchanged(model, rules, 0, (2, 1)).sliced.moved == 0, "stage 0 slices nothing"


def test_parameters_in_equal_slices_all_travel() -> None:
    model = nn.Module()
    model.first, model.second = matrix(4, 4), matrix(4, 4)
    rules = dict.fromkeys(model.parameters(), Muon())
    # each rank owns one of them: it receives half of it and sends half of the other
    moved = [exchanged(model, rules, 3, (2, 1), Place(rank)).sliced for rank in range(2)]
    assert moved == [GroupExchange(0, 8 + 8, 8 + 8)] * 2


def test_shards_travel_to_one_owner() -> None:
    model = nn.Module()
    model.sharded = matrix(6, 4, tensor=2)
    rules = {model.sharded: Muon()}
    found = [exchanged(model, rules, 1, (1, 2), Place(0, rank)) for rank in range(2)]
    assert [each.sharded for each in found] == [GroupExchange(0, 12, 12)] * 2
    assert [each.sliced.moved for each in found] == [0, 0]


def test_both_factors_of_a_pair_travel_to_one_owner() -> None:
    model = nn.Module()
    model.lora_A, model.lora_B = matrix(4, 5, tensor=2), matrix(6, 4, tensor=2)
    pairs = nn.ModuleDict({"layer": model})
    rules = dict.fromkeys((model.lora_A, model.lora_B), SpectralPair())
    # stage 3 halves both shards: values and momentum of one half come, the change goes back
    ranks = [exchanged(pairs, rules, 3, (2, 2), Place(0, rank)) for rank in range(2)]
    lacking = 5 + 6
    assert [each.sliced for each in ranks] == [GroupExchange(0, lacking, 2 * lacking)] * 2
    # and so do the other process's shards of both
    assert ranks[0].sharded == GroupExchange(0, 10 + 12, 2 * (10 + 12))
    assert ranks[1].sharded == GroupExchange(0, 2 * (10 + 12), 10 + 12)
    elsewhere = exchanged(pairs, rules, 3, (2, 2), Place(1, 0))
    assert elsewhere.sliced == GroupExchange(0, 2 * lacking, lacking)
    assert elsewhere.sharded == NOTHING


@pytest.mark.parametrize("stage", range(4))
def test_sums_travel_where_zero_slices(stage: int) -> None:
    model = nn.Linear(4, 8, bias=False, device="meta")
    zero = ZeroSettings(stage)

    def moved(matrices: MatrixTraffic | None) -> Payloads:
        return expected_payloads(model, [list(model.parameters())], zero, 1, matrices=matrices)

    kind = Traffic("all_reduce", "world", 1, "float32", "step")
    more = 0 if stage == 0 else 4 * 7
    with_sums = moved(MatrixTraffic(GroupExchange(sums=7)))
    assert with_sums.get(kind, 0) == moved(None).get(kind, 0) + more
    assert sum(with_sums.values()) == sum(moved(None).values()) + more


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_plan_asks_the_optimizer(
    stage: int, tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = (f"parallel.tensor={tensor}", "train.precision=bf16")
    loaded = load_run_config("configs/run/quickstart.yaml", overrides)
    copies = 2
    cluster = Cluster(gpus=copies * tensor)
    phase = plan_phases(loaded.config)[0]
    source = {"zero_optimization": {"stage": stage}}
    zero = resolve_deepspeed_config(source, loaded.config, copies)

    def estimated(method: Full) -> Estimate:
        changed = replace(phase, method=method)
        return PhaseEstimator(loaded, changed, cluster, copies).estimate(zero)

    full, projected = (kind(phase.method.config, 0, 1) for kind in (Full, ProjectedFull))
    plain, ruled = estimated(full), estimated(projected)
    tp = part_of_model(loaded.config.parallel)
    part = largest_part(loaded.architecture, projected, loaded.config.train, tp)
    layers = projection_layers(part).values()
    matrices = [parameter for layer in layers for parameter in layer.parameters()]
    slices = copies if stage else 1
    held = [n * size for p in matrices for n, size in matrix_state(p, Projected(), slices, tensor)]
    moments = sum(2 * 4 * p.numel() for p in matrices) / slices
    assert ruled.memory.states - plain.memory.states == round(sum(held) - moments)
    sums = sum(4 * WIDTH * global_shape(p)[1] for p in matrices)
    between = sums if stage else 0
    within = sums if tensor > 1 else 0  # every projection is sharded
    assert ruled.traffic.payload - plain.traffic.payload == between + within
    assert ruled.traffic.tensor_payload - plain.traffic.tensor_payload == within
    # norms and embeddings that every rank holds alike are not matrices
    assert ruled.states_held_alike == plain.states_held_alike
