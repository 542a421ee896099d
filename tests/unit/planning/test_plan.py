"""What a plan promises follows from closed forms that tests on several ranks measure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.accounting.collectives import wire_by_link, wire_bytes
from relora_ds.accounting.memory.model import expected_memory
from relora_ds.accounting.tp_traffic import GroupWork, shares_by_rank, tensor_payloads
from relora_ds.accounting.zero_traffic import bytes_of, expected_payloads
from relora_ds.config.load import LoadedRun, load_run_config
from relora_ds.config.model import projection_shapes
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.errors import ConfigError
from relora_ds.methods.build import meta_model, sharded_meta_model
from relora_ds.methods.formulation.choice import update_of
from relora_ds.methods.interface import projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.topology import part_of_model
from relora_ds.planning.memory_report import closed_form, storage_plan
from relora_ds.planning.plan import plan
from relora_ds.planning.results import Cluster, Cut

ROOT = Path(__file__).parents[3]
PAPER = ("train.global_batch_size=1024", "checkpoint.every=0")


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


own_size = partial(plan, compare_sizes=False)


def small(*overrides: str) -> LoadedRun:
    return load_run_config(
        "configs/run/quickstart.yaml", ("train.global_batch_size=64", *overrides)
    )


def test_the_published_saving_at_1b_and_what_stage_3_makes_of_it() -> None:
    run = "configs/run/llama_1b_switchlora.yaml"
    switch = own_size(load_run_config(run, PAPER), Cluster(gpus=64)).phases["switchlora"].stages
    overrides = (*PAPER, "model=configs/model/llama_1b.json", "train.seq_length=512")
    overrides += ("train.micro_batch_size=16", "optimizer.adapter_lr=1e-3")
    whole = own_size(
        load_run_config("configs/run/llama_60m_full.yaml", overrides), Cluster(gpus=64)
    )
    full = whole.phases["full"].stages

    def moved(key: str, stage: str) -> float:
        return getattr(switch[stage].traffic, key) / getattr(full[stage].traffic, key)

    for stage in ("0", "1", "2"):
        assert moved("gradient_payload", stage) <= 1 - 0.54
        assert moved("between_nodes", stage) <= 1 - 0.54
    # the frozen base travels as well: less is reduced, more is gathered
    assert moved("gradient_payload", "3") <= 1 - 0.54
    assert 0.85 < moved("between_nodes", "3") < 1.2
    # unless each node keeps a copy: then nothing frozen leaves it
    hpz = switch["3 hpZ 8"].traffic.between_nodes
    assert hpz < 0.6 * switch["3"].traffic.between_nodes
    assert hpz < 0.6 * full["3 hpZ 8"].traffic.between_nodes


def test_galore_reduces_its_projections_share_of_the_gradient_and_the_rest() -> None:
    settings = ("train.micro_batch_size=32", "train.global_batch_size=512")
    moved, trained = {}, {}
    for name in ("full", "galore"):
        loaded = load_run_config(f"configs/run/llama_60m_{name}.yaml", settings)
        phase = own_size(loaded, Cluster(gpus=4)).phases[name]
        moved[name] = phase.stages["1"].traffic.gradient_payload
        trained[name] = phase.trained
    layers = loaded.architecture.num_hidden_layers
    shapes = layers * [*projection_shapes(loaded.architecture).values()]
    dense = sum(m * n for m, n in shapes)
    rest = trained["full"] - dense
    rank = loaded.config.method.low_rank
    assert rank is not None
    share = sum(m * n * rank / min(m, n) for m, n in shapes)
    assert trained["galore"] == share + rest
    assert moved["galore"] / moved["full"] == pytest.approx((share + rest) / (dense + rest))


def test_a_refresh_is_counted_where_it_takes_more_than_the_gradients() -> None:
    loaded = load_run_config("configs/run/llama_60m_galore.yaml", ("train.micro_batch_size=128",))
    method = plan_phases(loaded.config)[-1].method
    layers = projection_layers(meta_model(loaded.architecture, method, loaded.config.train))
    dense = sum(4 * layer.spec.out_features * layer.spec.in_features for layer in layers.values())
    h, ffn = loaded.architecture.hidden_size, loaded.architecture.intermediate_size
    # a gradient in fp32, a Gram matrix and its decomposition in fp64
    choice = 4 * ffn * h + 8 * 4 * h * h
    for gpus, summed in ((4, 0), (1, dense)):
        for estimate in own_size(loaded, Cluster(gpus=gpus)).phases["galore"].stages.values():
            memory = estimate.memory
            assert memory.transient == max(0, choice + summed - memory.gradients)
    assert dense > 4 * choice


@pytest.mark.parametrize("gpus", [1, 4])
def test_memory_and_bytes_are_the_measured_closed_forms(gpus: int) -> None:
    loaded = small()
    config, train = loaded.config, loaded.config.train
    found = own_size(loaded, Cluster(gpus=gpus))
    for phase in plan_phases(config):
        model = meta_model(loaded.architecture, phase.method, train)
        groups = [group.parameters for group in phase.method.parameter_groups(model)]
        for stage in range(4):
            estimate = found.phases[phase.name].stages[str(stage)]
            storage = storage_plan(config, stage, gpus, torch.device("cuda"))
            form = closed_form(config, loaded.architecture, phase.method, storage)
            memory = estimate.memory
            assert memory.weights + memory.residual == form.weights
            same = ("indices", "gradients", "states", "activations", "transient")
            assert [getattr(memory, key) for key in same] == [getattr(form, key) for key in same]
            assert sum(asdict(memory).values()) == estimate.bytes_per_gpu
            source = {"zero_optimization": {"stage": stage}}
            resolved = resolve_deepspeed_config(source, config, gpus)
            traffic = estimate.traffic
            payloads = expected_payloads(model, groups, resolved, gpus)
            assert (traffic.payload, traffic.wire) == bytes_of(payloads)
            sent = traffic.within_node + traffic.between_nodes
            assert sent == pytest.approx(traffic.wire, rel=1e-12)


def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    tight = Cluster(gpus=2, gpu_memory=200e6)
    largest = own_size(small(), tight).phases["relora"].stages["1"].largest_micro_batch
    assert largest > 1

    def fits(micro: int) -> bool:
        batch = (f"train.micro_batch_size={micro}", f"train.global_batch_size={2 * micro}")
        return own_size(small(*batch), tight).phases["relora"].stages["1"].fits

    assert fits(largest)
    assert not fits(largest + 1)


def test_the_suggestion_follows_memory_and_bandwidth() -> None:
    assert plan(small(), Cluster(gpus=2, gpu_memory=1e6)).suggested is None
    # with memory to spare and a slow network, what moves least, to a percent
    slow = plan(small(), Cluster(gpus=16, bandwidth=1e6))
    times = [
        {name: estimate.seconds.serial for name, estimate in phase.stages.items()}
        for phase in slow.phases.values()
    ]
    worst = {name: max(each[name] for each in times) for name in times[0]}
    assert slow.suggested is not None
    assert slow.suggested.tensor == 1
    assert worst[slow.suggested.stage] <= 1.01 * min(worst.values()) < worst["2"]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("lane", ["act", "fold", "sequence"])
def test_a_cut_run_takes_up_and_moves_what_the_cut_model_does(stage: int, lane: str) -> None:
    key = "sequence=true" if lane == "sequence" else f"low_rank_plan={lane}"
    loaded = small("parallel.tensor=2", f"parallel.{key}")
    config, train = loaded.config, loaded.config.train
    found = own_size(loaded, Cluster(gpus=8, gpus_per_node=4))
    assert found.processes == 4
    method = plan_phases(config)[-1].method
    tp = part_of_model(config.parallel)
    model = sharded_meta_model(loaded.architecture, method, train, tp)
    groups = [group.parameters for group in method.parameter_groups(model)]
    estimate = found.phases["relora"].stages[str(stage)]
    storage = storage_plan(config, stage, 4, torch.device("cuda"))
    layers = projection_layers(model).values()
    update = update_of(layers, train, stage, 4, "cuda", round(Cluster(1, 1).gpu_memory))
    form = expected_memory(model, storage, groups, method.edited_weights(model), update)
    memory = estimate.memory
    assert memory.weights + memory.residual == form.weights
    assert [memory.gradients, memory.states, memory.activations] == [
        form.gradients,
        form.states,
        form.activations,
    ]
    resolved = resolve_deepspeed_config({"zero_optimization": {"stage": stage}}, config, 4)
    shares = shares_by_rank(model, groups, stage, 4)
    assert any(shares) == (lane != "act")
    within = tensor_payloads(model, resolved, GroupWork(2, update, max(shares), len(groups)))
    between = expected_payloads(model, groups, resolved, 4, tp_size=2)
    traffic = estimate.traffic
    assert traffic.tensor_payload == sum(within.values())
    assert (traffic.payload, traffic.wire) == bytes_of(between, within)
    # copies of the model lie on both nodes, a copy within one
    assert traffic.tensor_within_node == bytes_of(within).wire
    assert traffic.tensor_between_nodes == 0 < traffic.between_nodes
    seconds = estimate.seconds
    assert seconds.overlapped - seconds.tensor == pytest.approx(
        max(seconds.compute, seconds.communication)
    )


@pytest.mark.parametrize(("per_node", "near"), [(2, 1.0), (1, 0.0)])
def test_a_model_larger_than_a_node_talks_between_nodes(per_node: int, near: float) -> None:
    loaded = small("parallel.tensor=2", "parallel.low_rank_plan=fold")
    found = own_size(loaded, Cluster(gpus=4, gpus_per_node=per_node))
    traffic = found.phases["relora"].stages["1"].traffic
    inner = traffic.tensor_within_node, traffic.tensor_between_nodes
    assert inner[0] == pytest.approx(near * sum(inner))
    assert sum(inner) == pytest.approx(traffic.tensor_payload)  # a ring of two sends all of it


@pytest.mark.slow
def test_the_smallest_tensor_size_that_fits_is_suggested() -> None:
    loaded = small("train.gradient_reduction=micro_batch")
    roomy = plan(loaded, Cluster(gpus=2))
    cuts = [(cut.tensor, cut.low_rank_plan) for cut in roomy.sizes]
    assert cuts == [(1, "auto"), (2, "auto"), (2, "fold")]
    assert roomy.suggested is not None
    assert roomy.suggested.tensor == 1

    def least(tensor: int) -> float:
        found = plan(small(f"parallel.tensor={tensor}"), Cluster(gpus=2))
        stages = [phase.stages for phase in found.phases.values()]
        return min(max(each[name].bytes_per_gpu for each in stages) for name in stages[0])

    assert least(2) < least(1)
    between = (least(1) + least(2)) / 2 / (1 - Cluster.reserve)
    tight = plan(loaded, Cluster(gpus=2, gpu_memory=between))
    assert tight.suggested is not None
    assert tight.suggested.tensor == 2
    assert [cut.fits for cut in tight.sizes[:2]] == [False, True]


@pytest.mark.slow
def test_7b_on_one_node_is_better_left_uncut_unless_its_gpus_are_small() -> None:
    loaded = load_run_config("configs/run/llama_7b_sltrain.yaml", ("parallel.tensor=4",))
    found = plan(loaded, Cluster(gpus=8))
    assert {cut.tensor for cut in found.sizes} == {1, 2, 4, 8}
    assert all(cut.fits for cut in found.sizes)
    assert found.asked == Cut(tensor=4, low_rank_plan="auto", stage="2")
    assert found.suggested is not None
    assert found.suggested.tensor == 1
    # states are cut over all eight GPUs, whatever the size
    cut = [c for c in found.sizes if c.tensor > 1 and c.low_rank_plan == "auto"]
    assert [c.stage for c in cut] == ["1"] * 3
    assert max(c.states for c in cut) < 1.01 * min(c.states for c in cut)
    small = plan(loaded, Cluster(gpus=8, gpu_memory=16e9)).suggested
    assert small is not None
    assert (small.tensor, small.low_rank_plan) == (4, "auto")


@pytest.mark.slow
def test_whole_factors_of_7b_are_most_of_its_states() -> None:
    overrides = ("parallel.tensor=4", "parallel.low_rank_plan=fold")
    loaded = load_run_config("configs/run/llama_7b_sltrain.yaml", overrides)
    states = own_size(loaded, Cluster(gpus=8)).phases["sltrain"].stages["0"]
    # seven factors (1024, 4096) or (4096, 1024) per layer are whole on each of 4 GPUs, and norms
    alike = 32 * 7 * 1024 * 4096 + (2 * 32 + 1) * 4096
    per_element = 4 + 2 * (1 + 4 / 256)
    assert states.states_held_alike == pytest.approx(per_element * alike, rel=1e-9)
    assert states.states_held_alike > 0.6 * states.memory.states


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


@pytest.mark.slow
def test_the_tool_prints_both_forms() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/plan.py", "configs/run/quickstart.yaml", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--gpus", "2", "--json", "--gpu-memory", "40GB", "method.rank=8")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["cluster"]["gpu_memory"] == 40e9
    assert set(found["phases"]) == {"full", "relora"}
    cut = run("--gpus", "2", "parallel.tensor=2")
    assert "alike on all GPUs of a copy" in cut.stdout
    assert "with each tensor-parallel size" in cut.stdout
    wrong = run("--gpus", "2", "--gpu-memory", "much")
    assert wrong.returncode == 2
    assert "write 80GB" in wrong.stderr
