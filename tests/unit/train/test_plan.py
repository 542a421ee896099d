"""What a plan promises follows from closed forms that tests on several ranks measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.config.load import LoadedRun, load_run_config
from relora_ds.engine.collectives import wire_by_link, wire_bytes
from relora_ds.engine.deepspeed_config import resolve_deepspeed_config
from relora_ds.engine.traffic import bytes_of, expected_payloads
from relora_ds.errors import ConfigError
from relora_ds.methods.registry import plan_phases
from relora_ds.train.build import meta_model
from relora_ds.train.memory_report import closed_form, storage_plan
from relora_ds.train.plan import Cluster, plan

ROOT = Path(__file__).parents[3]
PAPER = ("train.global_batch_size=1024", "checkpoint.every=0")


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(*overrides: str) -> LoadedRun:
    return load_run_config(
        "configs/run/quickstart.yaml", ("train.global_batch_size=64", *overrides)
    )


def test_the_published_saving_at_1b_and_what_stage_3_makes_of_it() -> None:
    run = "configs/run/llama_1b_switchlora.yaml"
    switch = plan(load_run_config(run, PAPER), Cluster(gpus=64))["phases"]["switchlora"]["stages"]
    overrides = (*PAPER, "model=configs/model/llama_1b.json", "train.seq_length=512")
    overrides += ("train.micro_batch_size=16", "optimizer.adapter_lr=1e-3")
    full = plan(load_run_config("configs/run/llama_60m_full.yaml", overrides), Cluster(gpus=64))
    full = full["phases"]["full"]["stages"]

    def moved(key: str, stage: str) -> float:
        return switch[stage]["traffic"][key] / full[stage]["traffic"][key]

    for stage in ("0", "1", "2"):
        assert moved("gradient_payload", stage) <= 1 - 0.54
        assert moved("between_nodes", stage) <= 1 - 0.54
    # the frozen base travels as well: less is reduced, more is gathered
    assert moved("gradient_payload", "3") <= 1 - 0.54
    assert 0.85 < moved("between_nodes", "3") < 1.2
    # unless each node keeps a copy: then nothing frozen leaves it
    hpz = switch["3 hpZ 8"]["traffic"]["between_nodes"]
    assert hpz < 0.6 * switch["3"]["traffic"]["between_nodes"]
    assert hpz < 0.6 * full["3 hpZ 8"]["traffic"]["between_nodes"]


@pytest.mark.parametrize("gpus", [1, 4])
def test_memory_and_bytes_are_the_measured_closed_forms(gpus: int) -> None:
    loaded = small()
    config, train = loaded.config, loaded.config.train
    found = plan(loaded, Cluster(gpus=gpus))
    for phase in plan_phases(config):
        model = meta_model(loaded.architecture, phase.method, train)
        groups = [group.parameters for group in phase.method.parameter_groups(model)]
        for stage in range(4):
            estimate = found["phases"][phase.name]["stages"][str(stage)]
            storage = storage_plan(config, stage, gpus, torch.device("cuda"))
            form = closed_form(config, loaded.architecture, phase.method, storage)
            memory = estimate["memory"]
            assert memory["weights"] + memory["residual"] == form["weights"]
            same = ("indices", "gradients", "states", "activations", "transient")
            assert [memory[key] for key in same] == [form[key] for key in same]
            assert sum(memory.values()) == estimate["bytes_per_gpu"]
            source = {"zero_optimization": {"stage": stage}}
            resolved = resolve_deepspeed_config(source, config, gpus)
            traffic = estimate["traffic"]
            payloads = expected_payloads(model, groups, resolved, gpus)
            assert (traffic["payload"], traffic["wire"]) == bytes_of(payloads)
            sent = traffic["within_node"] + traffic["between_nodes"]
            assert sent == pytest.approx(traffic["wire"], rel=1e-12)


def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    tight = Cluster(gpus=2, gpu_memory=200e6)
    stage = plan(small(), tight)["phases"]["relora"]["stages"]["1"]
    largest = stage["largest_micro_batch"]
    assert largest > 1

    def fits(micro: int) -> bool:
        batch = (f"train.micro_batch_size={micro}", f"train.global_batch_size={2 * micro}")
        return plan(small(*batch), tight)["phases"]["relora"]["stages"]["1"]["fits"]

    assert fits(largest)
    assert not fits(largest + 1)


def test_the_suggestion_follows_memory_and_bandwidth() -> None:
    assert plan(small(), Cluster(gpus=2, gpu_memory=1e6))["suggested"] is None
    # with memory to spare and a slow network, what moves least, to a percent
    slow = plan(small(), Cluster(gpus=16, bandwidth=1e6))
    times = [
        {name: estimate["seconds"]["serial"] for name, estimate in phase["stages"].items()}
        for phase in slow["phases"].values()
    ]
    worst = {name: max(each[name] for each in times) for name in times[0]}
    assert worst[slow["suggested"]] <= 1.01 * min(worst.values()) < worst["2"]


@pytest.mark.parametrize("gpus", [12, 9])
def test_gpus_must_fill_their_nodes(gpus: int) -> None:
    with pytest.raises(ConfigError, match="must be a multiple"):
        plan(small(), Cluster(gpus=gpus))


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "reduce_scatter"])
def test_two_levels_send_what_one_ring_does(operation: str) -> None:
    assert wire_by_link(operation, 800, 8, 8) == (wire_bytes(operation, 800, 8), 0.0)
    near, far = wire_by_link(operation, 800, 8, 2)
    assert near + far == wire_bytes(operation, 800, 8)
    factor = 2 if operation == "all_reduce" else 1
    assert near == factor * 800 * 1 / 2
    assert far == factor * 400 * 3 / 4
    assert wire_by_link(operation, 800, 4, 1).near == 0.0


def test_the_tool_prints_both_forms() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/plan.py", "configs/run/quickstart.yaml", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--gpus", "2", "--json", "--gpu-memory", "40GB", "method.rank=8")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["cluster"]["gpu_memory"] == 40e9
    assert set(found["phases"]) == {"full", "relora"}
    wrong = run("--gpus", "2", "--gpu-memory", "much")
    assert wrong.returncode == 2
    assert "write 80GB" in wrong.stderr
