"""What a run's matrices are updated by."""

from __future__ import annotations

import pytest

from relora_ds.config.schema import RunConfig
from relora_ds.methods.build import meta_model
from relora_ds.methods.interface import matrix_rules
from relora_ds.methods.registry import plan_phases
from tests.harness.build import TINY, run_config


@pytest.mark.parametrize(
    ("method", "optimizer", "matrices"),
    [
        ({"name": "full"}, {"matrix": "muon"}, 14),
        ({"name": "low_rank", "rank": 4}, {"adapter": "spectral"}, 28),
    ],
)
def test_equal_optimizers_are_one_object_so_that_they_compute_together(
    method: dict[str, object], optimizer: dict[str, object], matrices: int
) -> None:
    config: RunConfig = run_config(method, optimizer=optimizer)
    model = meta_model(TINY, plan_phases(config)[-1].method, config.train)
    rules = matrix_rules(plan_phases(config)[-1].method, config.optimizer, model)
    assert len(rules) == matrices
    assert len({id(rule) for rule in rules.values()}) == 1


@pytest.mark.parametrize(
    ("name", "optimizer", "rate"),
    [
        ("low_rank", {}, 2.5e-2),
        ("relora", {}, 2.5e-2),
        ("switchlora", {}, 1.25e-2),
        ("switchlora", {"spectral": {"normalized": True}}, 2e-2),
        ("switchlora", {"adapter_lr": 2e-3}, 2e-3),
        ("switchlora", {"adapter_lr": 2e-3, "spectral": {"lr": 3e-2}}, 3e-2),
    ],
)
def test_pairs_have_the_rate_of_their_method_unless_one_is_given(
    name: str, optimizer: dict[str, object], rate: float
) -> None:
    settings: dict[str, object] = {"name": name, "rank": 4}
    if name == "relora":
        settings["merge_every"] = 4
    config = run_config(settings, optimizer={"adapter": "spectral", **optimizer})
    phase = plan_phases(config)[-1]
    peak = max(
        phase.learning_rates(step, config.optimizer)["pair"] for step in range(phase.last_step)
    )
    assert peak == pytest.approx(rate)
