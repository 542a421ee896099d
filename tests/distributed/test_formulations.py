"""`train.formulation` changes how projections compute, and nothing that they compute."""

from __future__ import annotations

import pytest

from tests.distributed.cases import formulations as cases
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

# every method, every stage, and the special ways once each
_ALONE = [(method, 0, "act") for method in cases.METHODS]
_ALONE += [
    ("relora", 3, "act"),
    ("sltrain", 3, "act"),
    ("relora", 2, "recomputed"),
    ("sltrain", 1, "recomputed"),
    ("switchlora", 0, "per_layer"),
]

_COPIES = [("relora", 1, "act"), ("switchlora", 2, "act"), ("lora", 3, "act")]
_SHARED = [
    ("relora", 1, "act"),
    ("relora", 3, "fold"),
    ("switchlora", 2, "act"),
    ("lora", 0, "act"),
    ("sltrain", 2, "act"),
]


def _same(found: dict[str, list[float]]) -> None:
    split = {name: losses for name, losses in found.items() if name.endswith("/split")}
    for name, losses in split.items():
        base = name.removesuffix("split")
        for formulation in cases.FORMULATIONS:
            assert found[base + formulation] == pytest.approx(losses, rel=2e-6), base + formulation


def test_one_rank_at_every_stage() -> None:
    _same(run_ranks(cases.losses, 1, cells=_ALONE))


def test_two_copies() -> None:
    _same(run_ranks(cases.losses, 2, cells=_COPIES))


def test_one_copy_on_two_ranks() -> None:
    """Factors that are cut along r are joined where weights are composed and gradients formed."""
    _same(run_ranks(cases.losses, 2, cells=_SHARED, tensor=2))


@pytest.mark.parametrize(
    ("ranks", "tensor", "cells"),
    [
        (2, 1, [("relora", 3, "act", "step"), ("full", 1, "act", "auto")]),
        (2, 2, [("switchlora", 1, "act", "step"), ("sltrain", 2, "fold", "layer")]),
        pytest.param(
            *(1, 1, [(method, 0, "act", "auto") for method in cases.PADDED]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(1, 1, [("relora", 1, "recomputed", "layer"), ("lora", 0, "per_layer", "split")]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(2, 2, [(method, 3, "act", "auto") for method in cases.PADDED]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(2, 1, [(method, 2, "act", "split") for method in cases.PADDED]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_padded_mlps_are_the_same_run(
    ranks: int, tensor: int, cells: list[tuple[str, int, str, str]]
) -> None:
    """Through merges, switches and refreshes of bases, and whatever ZeRO makes of the weights."""
    found = run_ranks(cases.padded_losses, ranks, 900.0, cells=cells, tensor=tensor)
    for cell, (plain, padded) in found.items():
        assert padded == pytest.approx(plain, rel=2e-6), cell


@pytest.mark.parametrize(
    ("method", "formulation", "stage"),
    [
        ("relora", "step", 1),
        ("switchlora", "step", 0),
        ("relora", "layer", 3),
    ],
)
def test_a_resumed_run_is_bit_identical(method: str, formulation: str, stage: int) -> None:
    arguments = {"method": method, "formulation": formulation, "stage": stage}
    unbroken, resumed = run_ranks(cases.resumed, 2, 400.0, **arguments)
    assert resumed == unbroken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "tensor", "cells"),
    [
        (1, 1, [("lora", 0, "per_layer"), ("relora", 0, "per_layer"), ("relora", 1, "recomputed")]),
        (1, 1, [("full", 1, "padded"), ("sltrain", 0, "padded")]),
        (2, 1, [(method, stage, "act") for method in cases.EVERY for stage in range(4)]),
        (2, 2, [("relora", 1, "act"), ("sltrain", 3, "act"), ("switchlora", 2, "fold")]),
    ],
)
def test_compiled_layers_are_the_same_run(
    ranks: int, tensor: int, cells: list[tuple[str, int, str]]
) -> None:
    found = run_ranks(cases.compiled_losses, ranks, 900.0, cells=cells, tensor=tensor)
    for cell, (plain, compiled) in found.items():
        assert compiled == pytest.approx(plain, rel=2e-6), cell


@pytest.mark.slow
def test_a_resumed_run_with_compiled_layers_is_bit_identical() -> None:
    arguments = {"method": "relora", "formulation": "layer", "stage": 1, "compiled": True}
    unbroken, resumed = run_ranks(cases.resumed, 2, 400.0, **arguments)
    assert resumed == unbroken
