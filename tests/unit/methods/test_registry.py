"""Phases follow from what a method's settings say, whichever method it is."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from relora_ds.config.methods.base import MethodSettings, WarmStarted
from relora_ds.config.methods.catalogue import registered as registered_settings
from relora_ds.config.schema import RunConfig
from relora_ds.methods.build import meta_model
from relora_ds.methods.full import Full
from relora_ds.methods.interface import Method, matrix_rules
from relora_ds.methods.registry import METHODS, plan_phases, register, registered
from relora_ds.methods.relora.relora import ReLoRA
from relora_ds.optim.matrix_wise.muon import Muon
from tests.harness.build import TINY, run_config


class ToyConfig(WarmStarted):
    """Settings of a method without factors that can be warm started."""

    name: Literal["toy"]
    """Registry key."""


class ColdConfig(MethodSettings):
    """Settings of a method that starts at once."""

    name: Literal["toy"]
    """Registry key."""


class Toy(Method[ToyConfig]):
    """Full-rank training under another name."""


def run(**method: Any) -> RunConfig:
    train = {"steps": 10, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 1}
    return RunConfig.model_validate(
        {
            "output_dir": "runs/toy",
            "model": "model.json",
            "deepspeed": "zero.json",
            "method": {"name": "toy", **method},
            "train": train,
            "optimizer": {"lr": 0.5, "adapter_lr": 0.25},
        }
    )


@pytest.mark.parametrize(("lr", "rate"), [(None, 0.5), (0.125, 0.125)])
def test_any_method_may_be_warm_started(lr: float | None, rate: float) -> None:
    with registered_settings(ToyConfig), registered("toy", Toy):
        config = run(warm_start_steps=4, warm_start_lr=lr)
        warm, toy = plan_phases(config)
    assert (type(warm.method), type(toy.method)) == (Full, Toy)
    assert (warm.name, warm.first_step, warm.last_step, warm.adapter_lr) == ("full", 0, 4, rate)
    assert (toy.name, toy.first_step, toy.last_step, toy.adapter_lr) == ("toy", 4, 10, 0.25)
    assert (warm.schedule.steps, toy.schedule.steps) == (10, 6)
    assert toy.method.config is config.method


def test_a_warm_start_may_run_under_muon_and_the_method_after_it_does_not() -> None:
    method = {"name": "relora", "rank": 4, "merge_every": 3, "warm_start_steps": 5}
    loaded = run_config(method, optimizer={"matrix": "muon"})
    rules = []
    for phase in plan_phases(loaded):
        model = meta_model(TINY, phase.method, loaded.train)
        found = matrix_rules(phase.method, loaded.optimizer, model)
        rules.append([type(rule) for rule in found.values()])
    assert rules == [[Muon] * (7 * TINY.num_hidden_layers), []]


def test_a_method_without_a_warm_start_is_one_phase() -> None:
    with registered_settings(ColdConfig), registered("toy", Toy):
        (phase,) = plan_phases(run())
    assert (phase.first_step, phase.steps) == (0, 10)
    with registered_settings(ToyConfig), registered("toy", Toy):
        (phase,) = plan_phases(run())
    assert (phase.first_step, phase.steps) == (0, 10)


def test_a_name_is_given_once_and_forgotten_afterwards() -> None:
    with pytest.raises(ValueError, match="'relora' is registered already, as ReLoRA"):
        register("relora", Toy)
    assert METHODS["relora"] is ReLoRA
    with registered("toy", Toy):
        assert METHODS["toy"] is Toy
    with pytest.raises(KeyError, match="inside"), registered("toy", Toy):
        raise KeyError("inside")
    assert "toy" not in METHODS
