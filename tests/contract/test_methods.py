"""What every registered method keeps, and one that only the tests know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.config.load import load_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.errors import ConfigError
from relora_ds.methods.build import (
    build_model,
    dense_weights,
    meta_model,
    sharded_meta_model,
    shards_of,
)
from relora_ds.methods.interface import Method, projection_layers
from relora_ds.methods.registry import METHODS, check_requirements, plan_phases
from relora_ds.methods.requirements import Requirements
from relora_ds.methods.schedule import Schedule
from relora_ds.model.init import InitialWeights
from relora_ds.model.llama import Llama
from relora_ds.parallel.shape import global_shape
from relora_ds.parallel.tensor import TensorParallel
from relora_ds.parallel.zero import ZeroSettings
from tests.contract.toy import Toy, toy
from tests.harness.build import TINY

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, dict[str, Any]] = {"full": {}, "toy": {}}
NAMES = [*sorted(METHODS), "toy"]


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with toy():
        yield


def run_config(name: str, **train: Any) -> RunConfig:
    settings = SETTINGS.get(name, {"rank": 4})
    description = {
        "output_dir": "unused",
        "model": "unused",
        "deepspeed": "unused",
        "method": {"name": name, **settings},
        "train": {
            "steps": 10,
            "seq_length": 16,
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "precision": "fp32",
            **train,
        },
    }
    return RunConfig.model_validate_json(json.dumps(description))


def method_of(name: str) -> Method[Any]:
    return plan_phases(run_config(name))[-1].method


def build(name: str) -> tuple[Method[Any], Llama]:
    config, method = run_config(name), method_of(name)
    source = InitialWeights(TINY, config.train.seed)
    model = build_model(TINY, method, config.train, source, torch.device("cpu"))
    return method, model


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_model_computes_what_the_methods_model_does(name: str) -> None:
    method, model = build(name)
    assert method.has_dense_weight
    train = run_config(name).train
    values = {key: value.detach() for key, value in model.state_dict(keep_vars=True).items()}
    values = {key: values[key] for key, _ in model.named_parameters()}
    weights = dense_weights(TINY, method, train, values)
    full = method_of("full")
    device = torch.device("cpu")
    dense = build_model(TINY, full, train, lambda key, shape: weights[key], device)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), dense.logits(tokens), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_groups_hold_everything_trained_once(name: str) -> None:
    method, model = build(name)
    groups = method.parameter_groups(model)
    grouped = [id(p) for group in groups for p in group.parameters]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert len(grouped) == len(set(grouped))
    assert all(group.parameters and group.role in ("dense", "adapter") for group in groups)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert {id(p) for p in method.edited_weights(model)} <= frozen
    assert {id(p) for p in method.vector_axes(model)} <= set(trained)


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_takes_the_rate_of_its_projection_and_never_decays(name: str) -> None:
    biased = TINY.model_copy(update={"attention_bias": True, "mlp_bias": True})
    method = method_of(name)
    model = meta_model(biased, method, run_config(name).train)
    groups = method.parameter_groups(model)
    of = {id(p): (group.role, group.decays) for group in groups for p in group.parameters}
    biases = [p for key, p in model.named_parameters() if key.endswith("_proj.bias")]
    assert len(biases) == 7 * TINY.num_hidden_layers
    assert {of[id(bias)] for bias in biases} == {("adapter", False)}


@pytest.mark.parametrize("name", NAMES)
def test_a_description_needs_no_memory(name: str) -> None:
    """Planning asks a model on the meta device and gets the same answers."""
    method, model = build(name)
    bare = meta_model(TINY, method, run_config(name).train)
    shapes = [(key, p.shape, p.requires_grad) for key, p in model.named_parameters()]
    assert [(key, p.shape, p.requires_grad) for key, p in bare.named_parameters()] == shapes
    assert all(p.is_meta for p in bare.parameters())
    assert method.memory_share(bare) == method.memory_share(model)
    found = [[group.role, len(group.parameters)] for group in method.parameter_groups(bare)]
    assert found == [[g.role, len(g.parameters)] for g in method.parameter_groups(model)]


@pytest.mark.parametrize("plan", ["act", "fold"])
@pytest.mark.parametrize("name", NAMES)
def test_shards_tile_every_parameter(name: str, plan: Any) -> None:
    method, train = method_of(name), run_config(name).train
    whole = meta_model(TINY, method, train)
    ranks = [
        sharded_meta_model(TINY, method, train, TensorParallel(rank, 2, plan=plan))
        for rank in range(2)
    ]
    shards = [shards_of(model) for model in ranks]
    assert shards[0].keys() == shards[1].keys()
    for key, parameter in whole.named_parameters():
        parts = [dict(model.named_parameters())[key] for model in ranks]
        assert [global_shape(part) for part in parts] == [parameter.shape] * 2
        held = [part.numel() for part in parts]
        assert (
            sum(held) == parameter.numel() if key in shards[0] else held == [parameter.numel()] * 2
        )


@pytest.mark.parametrize("name", NAMES)
def test_learning_rates_are_finite_and_start_with_the_schedule(name: str) -> None:
    method, schedule = method_of(name), Schedule("cosine", 10, 2, 0.1)
    rates = [method.lr_multiplier(step, schedule) for step in range(10)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert all(0.0 <= rate <= 1.0 for rate in rates)


@pytest.mark.parametrize("name", NAMES)
def test_projections_are_drawn_by_seed_and_name_alone(name: str) -> None:
    (_, first), (_, second) = build(name), build(name)
    for key, layer in projection_layers(first).items():
        again = projection_layers(second)[key].state_dict()
        assert all(torch.equal(value, again[part]) for part, value in layer.state_dict().items())


def test_requirements_are_checked_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Toy,
        "requirements",
        Requirements(
            frozenset({0, 1}),
            tensor_parallel=False,
            per_layer_update=False,
            optimizers=frozenset({"torch_adamw"}),
        ),
    )
    run = tmp_path / "toy.yaml"
    text = (ROOT / "configs" / "run" / "llama_60m_full.yaml").read_text()
    run.write_text(text.replace("name: full", "name: toy"))
    loaded = load_run_config(run, ["parallel.tensor=2"])
    with pytest.raises(ConfigError) as caught:
        check_requirements(loaded, ZeroSettings(3))
    problems = caught.value.problems
    for key in ("deepspeed: ", "parallel.tensor", "optimizer.name"):
        assert any(key in problem for problem in problems), problems
    assert len(problems) == 3
    assert all("toy" in problem for problem in problems)
    # what is not adamw cannot stand beside a matrix-wise optimizer
    other = load_run_config(run, ["optimizer.name=adamw8bit"])
    monkeypatch.setattr(Toy, "requirements", Requirements())
    with pytest.raises(ConfigError, match=r"optimizer\.name.*adamw8bit.*matrix by matrix"):
        check_requirements(other, ZeroSettings(2))
    plain = load_run_config(run)
    with pytest.raises(ConfigError, match=r"deepspeed.*offload_optimizer.*matrix by matrix"):
        check_requirements(plain, ZeroSettings(2, offloads_optimizer=True))
    check_requirements(plain, ZeroSettings(2))


def test_pairs_are_stepped_together_or_refused(tmp_path: Path) -> None:
    run = tmp_path / "spectral.yaml"
    text = (ROOT / "configs" / "run" / "llama_60m_low_rank.yaml").read_text()
    run.write_text(text)
    spectral = ["optimizer.adapter=spectral"]
    loaded = load_run_config(run, spectral)
    check_requirements(loaded, ZeroSettings(3))
    check_requirements(loaded, ZeroSettings(2, sub_group=1000))  # stage 3 alone has sub-groups
    with pytest.raises(ConfigError, match=r"sub_group_size 1,000.*write at least [\d,]+"):
        check_requirements(loaded, ZeroSettings(3, sub_group=1000))
    two = ["parallel.tensor=2", *spectral]

    for more in ([], ["parallel.low_rank_plan=fold"], ["method.rank=31"]):
        check_requirements(load_run_config(run, [*two, *more]), ZeroSettings(2))
    alone = [*spectral, "train.per_layer_update=true"]
    check_requirements(load_run_config(run, alone), ZeroSettings(0))
    rounded = load_run_config(run, [*alone, "train.master_weights=false"])
    with pytest.raises(ConfigError, match=r"master_weights.*needs fp32 copies"):
        check_requirements(rounded, ZeroSettings(0))
    for name in ("relora", "switchlora"):
        other = load_run_config(ROOT / "configs" / "run" / f"llama_130m_{name}.yaml", spectral)
        check_requirements(other, ZeroSettings(2))
    for name in ("muon", "galore"):
        other = ROOT / "configs" / "run" / f"llama_130m_{name}.yaml"
        with pytest.raises(ConfigError, match=r"optimizer\.adapter.*trains no factors"):
            load_run_config(other, spectral)
