"""Measured costs of projections are those that one derives by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, Literal, cast

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from relora_ds.accounting.footprints import footprint_of, footprints, measured_footprint
from relora_ds.config.methods.catalogue import MethodConfig
from relora_ds.methods.interface import Method
from relora_ds.methods.registry import METHODS
from relora_ds.parallel.footprint import Exchange, Footprint, UpdateSize
from relora_ds.parallel.linear import LinearSpec, Projection
from relora_ds.parallel.tensor import SINGLE, TensorParallel

R, IN, OUT = 4, 12, 20
SPARSE = {"name": "sltrain", "rank": R, "sparsity": 0.2, "gradient": "dense"}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "relora": {"name": "relora", "rank": R},
    "lora_trainable": {"name": "lora", "rank": R, "trainable_scaling": True},
    "low_rank": {"name": "low_rank", "rank": R},
    "sltrain": {**SPARSE, "keep_composed": "layer"},
    "sltrain_step": {**SPARSE, "keep_composed": "step"},
}
GROUPS = {
    "alone": SINGLE,
    "act": TensorParallel(0, 2),
    "fold": TensorParallel(1, 2, plan="fold"),
    "sequence": TensorParallel(1, 2, sequence=True),
}
SIZES = (
    UpdateSize(6, formulation="split"),
    UpdateSize(10, 3, torch.bfloat16, formulation="split"),
)
Style = Literal["column", "row"]


def method(name: str) -> Method[Any]:
    config = TypeAdapter(MethodConfig).validate_python(SETTINGS[name])
    return METHODS[config.name](cast(Any, config), seed=1, steps=9)


def shard(name: str, style: Style, tp: TensorParallel, recomputed: bool = False) -> Projection:
    """One rank's part of a layer on the meta device."""
    with torch.device("meta"):
        layer = method(name).linear(LinearSpec("p", IN, OUT, True, style, tp))
    layer.recomputed = recomputed
    layer.shard_over_ranks()
    return layer


def by_hand(layer: Projection, name: str, size: UpdateSize) -> Footprint:
    """What layers with (T, r) activations between their factors save and exchange."""
    tp, style, working = layer.spec.tp, layer.spec.style, size.dtype.itemsize
    cut = name != "full" and tp.size > 1 and tp.plan != "fold"
    inner = R // tp.size if cut and style == "row" else R
    keeps = not layer.recomputed and (name == "low_rank" or (name != "full" and cut))
    operations = ["all_gather", "reduce_scatter"]
    there, back = operations if style == "column" else operations[::-1]
    calls = size.micro_batches
    moved = calls, calls * size.tokens * R
    found = [Exchange(cast(Any, there), "forward", *moved)]
    found += [Exchange(cast(Any, there), "backward", *moved)] if layer.recomputed else []
    found.append(Exchange(cast(Any, back), "backward", *moved))
    return Footprint(
        exchanges=tuple(found) if cut else (),
        saved_bytes_per_token=working * inner if keeps else 0,
    )


@pytest.mark.parametrize("name", ["full", "relora", "lora_trainable", "low_rank"])
@pytest.mark.parametrize("group", GROUPS)
def test_layers_that_state_nothing(name: str, group: str) -> None:
    for style, recomputed, size in product(("column", "row"), (False, True), SIZES):
        layer = shard(name, cast(Style, style), GROUPS[group], recomputed)
        assert layer.footprint(size) is None
        assert footprint_of(layer, size) == by_hand(layer, name, size)


@pytest.mark.parametrize("group", GROUPS)
def test_a_composed_weight_is_held_or_made_for_a_moment(group: str) -> None:
    for style, recomputed, size in product(("column", "row"), (False, True), SIZES):
        layer = shard("relora", cast(Style, style), GROUPS[group], recomputed)
        weight = layer_weight(layer) * size.dtype.itemsize
        for formulation in ("layer", "step"):
            found = footprint_of(layer, replace(size, formulation=formulation))
            kept, cut = formulation == "step", GROUPS[group].plan != "fold"
            assert found.held_bytes == kept * weight
            assert found.saved_bytes_per_token == 0
            assert found.scratch_bytes in ((0, weight) if kept else (weight,))
            # a factor is joined where the weight is composed and where gradients are formed
            joined = {each.phase: each.calls for each in found.exchanges}
            if GROUPS[group].size == 1 or not cut:
                assert not joined
            else:
                assert joined["forward"] == (1 if kept else size.micro_batches)


@pytest.mark.parametrize("name", ["sltrain", "sltrain_step"])
@pytest.mark.parametrize("group", GROUPS)
def test_what_a_layer_states_is_what_a_run_shows(name: str, group: str) -> None:
    for style, recomputed, size in product(("column", "row"), (False, True), SIZES):
        layer = shard(name, cast(Style, style), GROUPS[group], recomputed)
        stated, shown = layer.footprint(size), measured_footprint(layer, size)
        assert stated is not None
        # a weight or its gradient, without positions and joined factors, which are smaller
        assert shown.scratch_bytes == layer_weight(layer) * size.dtype.itemsize
        assert stated.scratch_bytes > shown.scratch_bytes
        assert replace(shown, scratch_bytes=stated.scratch_bytes) == stated


def layer_weight(layer: Projection) -> int:
    return OUT * IN // layer.spec.tp.size


def test_neither_the_layer_nor_its_group_is_touched() -> None:
    layer = method("sltrain_step").linear(LinearSpec("p", IN, OUT, False, "column"))
    with torch.no_grad():
        method("sltrain_step").initialize(layer, torch.zeros(OUT, IN))
    layer.begin_update(UpdateSize(2))
    layer.product(torch.ones(2, IN))
    (held,) = layer.held()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    shown = measured_footprint(layer, UpdateSize(5))
    assert shown.held_bytes == 4 * OUT * IN
    assert layer.held()[0] is held
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())


class Composed(Projection):
    """W = B A, composed once per update, with a nonlinear function of the whole sum behind it."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.left = nn.Parameter(torch.empty(spec.out_features, R))
        self.right = nn.Parameter(torch.empty(R, spec.in_features))
        self.bias = None
        self.weight: torch.Tensor | None = None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            self.weight = (self.left @ self.right).detach()
        return self.spec.tp.leave(x @ (self.left @ self.right + self.weight).t()).exp()

    def shard_dims(self) -> dict[str, int]:
        return {"right": 1}

    def held(self) -> tuple[torch.Tensor, ...]:
        return () if self.weight is None else (self.weight,)


def test_a_new_layer_needs_no_word_about_its_costs() -> None:
    with torch.device("meta"):
        layer = Composed(LinearSpec("p", IN, OUT, False, "row", TensorParallel(0, 2)))
    layer.shard_over_ranks()
    weight = 4 * OUT * IN // 2
    assert footprint_of(layer, UpdateSize(6, 5)) == Footprint(
        exchanges=(Exchange("all_reduce", "forward", 5, 5 * 6 * OUT),),
        held_bytes=weight,
        saved_bytes_per_token=4 * OUT,  # the result of exp
        scratch_bytes=2 * weight,  # the product, and its sum with what is held
    )


def test_layers_of_one_kind_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        layers = [
            method("relora").linear(LinearSpec(f"{n}", IN, OUT, False, "column")) for n in "ab"
        ]
        layers.append(method("relora").linear(LinearSpec("c", OUT, IN, False, "row")))
    model = nn.ModuleList(layers)
    measured = []
    monkeypatch.setattr(
        "relora_ds.accounting.footprints.measured_footprint",
        lambda layer, size: measured.append(layer.spec.name) or Footprint(held_bytes=7),
    )
    found = footprints(model, UpdateSize(1))
    assert measured == ["a", "c"]
    assert list(found) == layers
    assert all(each.held_bytes == 7 for each in found.values())
