"""The dictionary that DeepSpeed gets: golden files, every conflict named, nothing unknown."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest

from relora_ds.config.load import load_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.config import (
    islands_advice,
    reduction_advice,
    resolve_deepspeed_config,
)
from relora_ds.engine.deepspeed.reading.keys import REFUSED_KEYS, TOP_KEYS, ZERO_FIXED, ZERO_KEYS
from relora_ds.errors import ConfigError

ROOT = Path(__file__).parents[4]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return load_run_config("configs/run/quickstart.yaml").config


def problems_with(source: Any, config: RunConfig, dp_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed_config(source, config, dp_size)
    return error.value.problems


@pytest.mark.parametrize(
    ("run", "stage"),
    [
        ("quickstart", 0),
        ("quickstart", 1),
        ("quickstart", 2),
        ("quickstart", 3),
        ("llama_60m_relora", 2),
    ],
)
def test_golden(run: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run_config(f"configs/run/{run}.yaml").config
    resolved = resolve_deepspeed_config(f"configs/zero/zero{stage}.json", config, 2)
    golden = ROOT / f"tests/golden/deepspeed_{run}_zero{stage}.json"
    assert resolved.deepspeed == json.loads(golden.read_text())
    assert resolved.stage == stage


def test_the_source_is_not_changed(config: RunConfig) -> None:
    source = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}
    before = deepcopy(source)
    first = resolve_deepspeed_config(source, config, 2)
    assert source == before
    assert first == resolve_deepspeed_config(source, config, 2)


def test_an_empty_file_is_stage_zero(config: RunConfig) -> None:
    resolved = resolve_deepspeed_config({}, config, 2)
    assert resolved.stage == 0
    assert resolved.deepspeed["gradient_accumulation_steps"] == 1
    assert resolved.deepspeed["zero_allow_untested_optimizer"] is True


def test_buckets_are_no_larger_than_what_is_trained(config: RunConfig) -> None:
    source = {"zero_optimization": {"stage": 2, "allgather_bucket_size": 7}}
    resolved = resolve_deepspeed_config(source, config, 2, trained_elements=1000)
    assert resolved.deepspeed["zero_optimization"]["reduce_bucket_size"] == 1000
    assert resolved.deepspeed["zero_optimization"]["allgather_bucket_size"] == 7


def test_switched_off_blocks_of_other_trainers_are_dropped(config: RunConfig) -> None:
    source = {"fp16": {"enabled": "auto", "loss_scale": 0}, "amp": {"enabled": False}}
    resolved = resolve_deepspeed_config(source, config, 1)
    assert not {"fp16", "amp"} & set(resolved.deepspeed)


def test_a_conflict_names_the_line_and_both_values(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(
        '{\n\t"train_micro_batch_size_per_gpu": 8,\n\t"bf16": {"enabled": true},\n'
        '\t"gradient_clipping": 0.5,\n\t"gradient_accumulation_steps": 3\n}'
    )
    remedy = 'write "auto" or the same value, or remove the key'
    assert problems_with(path, config, 2) == [
        f"{path}:2: train_micro_batch_size_per_gpu: is 8, but train.micro_batch_size is 4: "
        + remedy,
        f"{path}:3: bf16.enabled: is true, but train.precision is fp32: {remedy}",
        f"{path}:4: gradient_clipping: is 0.5, but optimizer.clip is 1.0: {remedy}",
        f"{path}:5: gradient_accumulation_steps: is 3, but train.global_batch_size / "
        f"(train.micro_batch_size x 2 processes) is 1: {remedy}",
    ]


@pytest.mark.parametrize(
    ("source", "key", "part"),
    [
        ({"train_micro_batch_size": 1}, "train_micro_batch_size", "did you mean"),
        ({"zero_optimisation": {}}, "zero_optimisation", "`zero_optimization`?"),
        ({"optimizer": "AdamW"}, "optimizer", "must be an object"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type", "schedule.*"),
        ({"fp16": {"enabled": True}}, "fp16", "train.precision bf16"),
        ({"elasticity": {"enabled": True}}, "elasticity", "train.global_batch_size"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency", "data sampling"),
        ({"checkpoint": {"writer": {}}}, "checkpoint", "by this trainer"),
        ({"pipeline": {"stages": 2}}, "pipeline", "pipeline parallelism"),
        ({"communication_data_type": "fp16"}, "communication_data_type", "fp32 or bf16"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "means over the global batch"),
        (
            {"zero_allow_untested_optimizer": False},
            "zero_allow_untested_optimizer",
            "own optimizer",
        ),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown", "must be true or false"),
        ({"train_batch_size": True}, "train_batch_size", "must be a number"),
        ({"zero_optimization": 2}, "zero_optimization", "must be an object"),
        ({"bf16": "on"}, "bf16", "must be an object"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", "fp32 masters"),
        ({"bf16": {"enable": True}}, "bf16.enable", "did you mean `enabled`?"),
    ],
)
def test_top_level_refusals(config: RunConfig, source: Any, key: str, part: str) -> None:
    (problem,) = problems_with(source, config)
    assert problem.startswith(f"DeepSpeed configuration: {key}: ")
    assert part in problem


@pytest.mark.parametrize(
    ("zero", "key", "part"),
    [
        ({"stage": 4}, "stage", "is 4, but must be 0, 1, 2 or 3"),
        ({"stage": "auto"}, "stage", "must be 0, 1, 2 or 3"),
        ({"stage": True}, "stage", "must be 0, 1, 2 or 3"),
        ({"stage": None}, "stage", "must be 0, 1, 2 or 3"),
        ({"reduce_bucket": 1}, "reduce_bucket", "did you mean `reduce_bucket_size`?"),
        ({"reduce_bucket_size": "5e8"}, "reduce_bucket_size", "must be a number"),
        ({"reduce_bucket_size": 1e999}, "reduce_bucket_size", "must be a number"),
        ({"sub_group_size": float("nan")}, "sub_group_size", "must be a number"),
        ({"reduce_bucket_size": -1}, "reduce_bucket_size", "must not be negative"),
        ({"reduce_bucket_size": 1e30}, "reduce_bucket_size", "must be at most 100000000000"),
        ({"allgather_bucket_size": 10**12}, "allgather_bucket_size", "must be at most"),
        ({"sub_group_size": 2**63}, "sub_group_size", "must be at most 9223372036854775807"),
        (
            {"stage": 2, "round_robin_gradients": True},
            "round_robin_gradients",
            "change other parameters",
        ),
        ({"load_from_fp32_weights": False}, "load_from_fp32_weights", "must be true or absent"),
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients", "rounds the weights"),
        ({"zero_hpz_partition_size": 8}, "zero_hpz_partition_size", "is 8, but needs stage 3"),
        ({"cpu_offload": True}, "cpu_offload", "offload_optimizer replaces it"),
        ({"offload_param": {"device": "cpu"}}, "offload_param", "stage 3"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow", "another state layout"),
        ({"stage": 3, "leaf_module": {"classes": []}}, "leaf_module", "by itself"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device", '"cpu" and "none"'),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "offload_optimizer.ratio",
            "must be 1 or absent",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            "offload_optimizer.super_offload",
            "another layout",
        ),
        ({"overlap_comm": "always"}, "overlap_comm", "must be true or false"),
    ],
)
def test_zero_refusals(config: RunConfig, zero: dict[str, Any], key: str, part: str) -> None:
    (problem,) = problems_with({"zero_optimization": zero}, config)
    assert problem.startswith(f"DeepSpeed configuration: zero_optimization.{key}: ")
    assert part in problem


def test_the_batch_must_divide(config: RunConfig) -> None:
    (problem,) = problems_with({}, config, 3)
    assert problem.startswith("train.global_batch_size: is 8, but must be a multiple of 12")


def test_offload_needs_an_optimizer_that_runs_on_the_host(config: RunConfig) -> None:
    source = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    resolved = resolve_deepspeed_config(source, config, 1)
    assert resolved.deepspeed["zero_force_ds_cpu_optimizer"] is False
    fused = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"name": "fused_adam"})}
    )
    (problem,) = problems_with(source, fused)
    assert "needs optimizer.name adamw or cpu_adam" in problem


def test_offload_works_with_its_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = ["optimizer.name=cpu_adam", "method.reset.steps=false"]
    config = load_run_config("configs/run/quickstart.yaml", overrides).config
    offload = {"device": "cpu", "ratio": 1.0, "super_offload": False}
    source = {"zero_optimization": {"stage": 2, "offload_optimizer": offload}}
    resolved = resolve_deepspeed_config(source, config, 1)
    assert resolved.deepspeed["zero_optimization"]["offload_optimizer"] == offload


def test_the_zero_keys_are_those_of_the_installed_deepspeed() -> None:
    module = pytest.importorskip("deepspeed.runtime.zero.config")
    installed = {}
    for name, field in module.DeepSpeedZeroConfig.model_fields.items():
        types = {kind for kind in get_args(field.annotation) if kind is not type(None)}
        kind = types.pop() if types else field.annotation
        kinds = {bool: "boolean", int: "number", module.ZeroStageEnum: "number"}
        installed[field.alias or name] = kinds.get(kind, "section")
    assert installed == ZERO_KEYS
    assert set(ZERO_FIXED) <= set(ZERO_KEYS)
    assert not set(TOP_KEYS) & set(REFUSED_KEYS)


def test_deepspeed_accepts_the_result(config: RunConfig) -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    resolved = resolve_deepspeed_config("configs/zero/zero2.json", config, 1)
    parsed = runtime.DeepSpeedConfig(resolved.deepspeed)
    assert parsed.zero_optimization_stage == 2
    assert parsed.gradient_accumulation_steps == 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_per_layer_updates_need_whole_gradients(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = load_run_config("configs/run/quickstart.yaml", ["train.per_layer_update=true"]).config
    problems = problems_with({"zero_optimization": {"stage": stage}}, run)
    assert len(problems) == 1
    for part in (f"is {stage}", "needs 0", "stage 2 or 3 with a small reduce_bucket_size"):
        assert part in problems[0]
    assert resolve_deepspeed_config({}, run, 1).stage == 0


def test_per_layer_updates_average_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = load_run_config("configs/run/quickstart.yaml", ["train.per_layer_update=true"]).config
    assert resolve_deepspeed_config({}, run, 1).deepspeed["communication_data_type"] == "fp32"
    (problem,) = problems_with({"communication_data_type": "bf16"}, run)
    assert "averages gradients in fp32" in problem


def test_fp32_sums_of_gradients_need_stage_1_in_bf16(config: RunConfig) -> None:
    types = {"data_types": {"grad_accum_dtype": "fp32"}}
    bf16 = config.train.model_copy(update={"precision": "bf16"})
    rounded = config.model_copy(update={"train": bf16})
    for stage in range(4):
        source = {"zero_optimization": {"stage": stage}, **types}
        if stage == 1:
            resolved = resolve_deepspeed_config(source, rounded, 2)
            assert resolved.deepspeed["data_types"] == types["data_types"]
        else:
            (problem,) = problems_with(source, rounded)
            assert "data_types.grad_accum_dtype" in problem
            assert "BF16_Optimizer" in problem
    source = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp16"}}
    assert "fp16" in problems_with(source, rounded)[0]
    bf16_states = {"bf16": {"bf16_master_weights_and_grads": True}}
    assert "lose every update below half a unit" in problems_with(bf16_states, rounded)[0]


@pytest.mark.parametrize(
    ("stage", "size", "part"),
    [(2, 2, "needs stage 3"), (3, 3, "must divide the 2 processes"), (3, 0, "must divide")],
)
def test_hpz_has_its_place(config: RunConfig, stage: int, size: int, part: str) -> None:
    zero = {"stage": stage, "zero_hpz_partition_size": size}
    (problem,) = problems_with({"zero_optimization": zero}, config, dp_size=2)
    assert "zero_hpz_partition_size" in problem
    assert part in problem


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_o"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
    ],
)
def test_what_islands_do_not_go_with(config: RunConfig, source: dict[str, Any], key: str) -> None:
    assert resolve_deepspeed_config(source, config, 2)
    parallel = config.parallel.model_copy(update={"islands": 2})
    apart = config.model_copy(update={"parallel": parallel})
    (problem,) = problems_with(source, apart, dp_size=2)
    assert key in problem
    assert "parallel.islands is 2" in problem


def test_islands_that_send_the_same_several_times_are_pointed_out(config: RunConfig) -> None:
    def advice(stage: int, islands: int, copies: int) -> str:
        resolved = resolve_deepspeed_config({"zero_optimization": {"stage": stage}}, config, copies)
        return str(islands_advice(resolved, islands))

    assert "the 2 copies of the model in an island all send the same" in advice(0, 2, 2)
    assert {advice(0, 1, 2), advice(1, 2, 2), advice(0, 2, 1)} == {"None"}


def test_stages_that_reduce_too_often_are_pointed_out(config: RunConfig) -> None:
    def advice(stage: int, **train: Any) -> str | None:
        changed = config.model_copy(update={"train": config.train.model_copy(update=train)})
        resolved = resolve_deepspeed_config({"zero_optimization": {"stage": stage}}, changed, 1)
        return reduction_advice(resolved)

    assert config.train.global_batch_size > config.train.micro_batch_size
    assert advice(1) is None
    assert advice(2, gradient_reduction="step") is None
    assert advice(2, global_batch_size=config.train.micro_batch_size) is None
    assert "train.gradient_reduction: step" in str(advice(2))
    assert "ZeRO stage 3" in str(advice(3))


def test_gradients_that_go_to_the_host_are_reduced_each_time(config: RunConfig) -> None:
    train = config.train.model_copy(update={"gradient_reduction": "step"})
    step = config.model_copy(update={"train": train})
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    resolved = resolve_deepspeed_config({"zero_optimization": zero}, step, 1)
    assert not resolved.reduces_once
    assert "offload_optimizer takes gradients to the host" in str(reduction_advice(resolved))
    on_device = resolve_deepspeed_config({"zero_optimization": {"stage": 2}}, step, 1)
    assert on_device.reduces_once
