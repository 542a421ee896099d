"""The shapes of 37 public ZeRO JSONs: taken as they are, or refused by key with the reason.

Settings are those of files that projects ship with their training scripts; values that say nothing
here are as they stand there.
"""

from __future__ import annotations

from typing import Any

import pytest

from relora_ds.config.load import load_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.errors import ConfigError
from tests.unit.engine.deepspeed.reading.test_foreign import ALIASES, BATCHES, FP16, OPTIMIZER, ROOT

BF16 = {"enabled": "auto"}
HALF = {"fp16": FP16, "bf16": BF16}
CPU, PINNED = {"device": "cpu"}, {"device": "cpu", "pin_memory": True}
OVERLAPPED = {"overlap_comm": True, "contiguous_gradients": True}
BUCKETS = {"allgather_partitions": True, "allgather_bucket_size": 5e8, "reduce_scatter": True,
           "reduce_bucket_size": 5e8, **OVERLAPPED}  # fmt: skip
SHARDED = {"stage": 3, **OVERLAPPED, "sub_group_size": 1e9, "reduce_bucket_size": "auto", **ALIASES,
           "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}  # fmt: skip
SHARDED_BY_FIELD = {"stage": 3, **OVERLAPPED, "sub_group_size": 0, "reduce_bucket_size": "auto",
                    "stage3_prefetch_bucket_size": "auto",
                    "stage3_param_persistence_threshold": "auto", "max_live_parameters": 0,
                    "max_reuse_distance": 0,
                    "gather_16bit_weights_on_model_save": True}  # fmt: skip
DECAY = {
    "type": "WarmupDecayLR",
    "params": dict.fromkeys(
        ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"
    ),
}
WARMUP = {
    "type": "WarmupLR",
    "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
}
QUIET = {"steps_per_print": 2000, "wall_clock_breakdown": False}
UNTESTED = {"zero_allow_untested_optimizer": True}


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


TAKEN: dict[str, dict[str, Any]] = {
    "axolotl zero1": {**zero(stage=1, overlap_comm=True), **HALF, **BATCHES,
                      "wall_clock_breakdown": False},
    "axolotl zero2": {**zero(stage=2, offload_optimizer=CPU, **OVERLAPPED), **HALF, **BATCHES},
    "axolotl zero3": {**zero(**SHARDED_BY_FIELD), **HALF, **BATCHES},
    "axolotl zero3_bf16": {**zero(**SHARDED_BY_FIELD), "bf16": {"enabled": True}, **BATCHES},
    "axolotl zero3_bf16_cpuoffload_all": {
        **zero(**SHARDED_BY_FIELD, offload_optimizer=PINNED, offload_param=PINNED),
        "bf16": {"enabled": True}, **BATCHES},
    "axolotl zero3_bf16_cpuoffload_params": {
        **zero(**SHARDED_BY_FIELD, offload_param=PINNED), "bf16": {"enabled": True}, **BATCHES},
    "Baichuan2": {**BATCHES, "bf16": BF16, **zero(stage=3, **OVERLAPPED), **QUIET},
    "Chinese-LLaMA-Alpaca-2": {**HALF, **zero(stage=2, **BUCKETS), **BATCHES, **QUIET},
    "HF docs, the least": zero(stage=2),
    "HF docs z3": {**HALF, "optimizer": OPTIMIZER, "scheduler": WARMUP, **BATCHES, **QUIET,
                   **zero(**SHARDED, offload_optimizer=PINNED, offload_param=PINNED)},
    "FastChat s2": {**zero(stage=2, offload_optimizer=CPU, reduce_bucket_size="auto", **OVERLAPPED),
                    **HALF, **BATCHES},
    "FastChat s3": {**zero(**SHARDED, offload_optimizer=CPU, offload_param=CPU), **HALF, **BATCHES},
    "LLaMA-Factory z0": {**BATCHES, **UNTESTED, **HALF,
                         **zero(stage=0, **BUCKETS, round_robin_gradients=True)},
    "LLaMA-Factory z3": {**BATCHES, **UNTESTED, **HALF, **zero(**SHARDED)},
    "LLaMA-Factory z3_offload": {
        **BATCHES, **UNTESTED, **HALF,
        **zero(**SHARDED, offload_optimizer=PINNED, offload_param=PINNED)},
    "LMFlow z3": {**HALF, **zero(**SHARDED), **BATCHES, **QUIET},
    "stanford_alpaca": {"bf16": BF16, "optimizer": OPTIMIZER, "scheduler": DECAY, **BATCHES,
                        **zero(**SHARDED, offload_optimizer=PINNED, offload_param=PINNED),
                        "steps_per_print": 5, "wall_clock_breakdown": False},
    "LLaVA": {**HALF, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
              "gradient_accumulation_steps": "auto", **zero(**SHARDED)},
    "LLaSA": {**HALF, "optimizer": OPTIMIZER, "scheduler": WARMUP, **BATCHES, **zero(**SHARDED)},
    "dolly z3": {"bf16": {"enabled": True}, "optimizer": OPTIMIZER, "scheduler": WARMUP, **BATCHES,
                 **zero(**SHARDED), **QUIET},
}  # fmt: skip
"""By name; each says nothing that contradicts a run of ours."""

REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "LLaMA-Factory z2": (
        {**BATCHES, **UNTESTED, **HALF, **zero(stage=2, **BUCKETS, round_robin_gradients=True)},
        {"zero_optimization.round_robin_gradients": "must be false or absent"}),
    "LLaMA-Factory z2_offload": (
        {**BATCHES, **UNTESTED, **HALF,
         **zero(stage=2, offload_optimizer=PINNED, **BUCKETS, round_robin_gradients=True)},
        {"zero_optimization.round_robin_gradients": "must be false or absent"}),
    "HF docs z2": (
        {**HALF, "optimizer": OPTIMIZER, "scheduler": WARMUP, **BATCHES,
         **zero(stage=2, **BUCKETS, round_robin_gradients=True)},
        {"zero_optimization.round_robin_gradients": "must be false or absent"}),
    "transformers' test z3": (
        {"fp16": {**FP16, "enabled": True}, **zero(**SHARDED), **BATCHES},
        {"fp16": "use train.precision bf16"}),
    "pandora z3": (
        {**zero(**SHARDED), "fp16": {"enabled": True},
         "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}},
        {"fp16": "use train.precision bf16",
         "scheduler.params.warmup_num_steps": "set schedule.* there"}),
    "Megatron-DeepSpeed curriculum": (
        {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 16, **zero(stage=0),
         "fp16": {"enabled": True}, "curriculum_learning": {"enabled": True}},
        {"train_batch_size": "", "train_micro_batch_size_per_gpu": "", "fp16": "",
         "curriculum_learning": "remove it"}),
    "Megatron-DeepSpeed finetune_hf_llama, stage 0": (
        {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 16, **zero(stage=0),
         "bf16": {"enabled": True}},
        {"train_batch_size": "", "train_micro_batch_size_per_gpu": ""}),
    "Megatron-DeepSpeed finetune_hf_llama, stage 3": (
        {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 16, **zero(stage=3),
         "bf16": {"enabled": True}},
        {"train_batch_size": "", "train_micro_batch_size_per_gpu": ""}),
    "Megatron-DeepSpeed universal checkpointing": (
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "steps_per_print": 1,
         **zero(stage=1), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
         "wall_clock_breakdown": False},
        {"train_batch_size": "", "train_micro_batch_size_per_gpu": ""}),
    "Megatron-DeepSpeed fork z3": (
        {"train_batch_size": 16, "gradient_clipping": 1.0, **zero(stage=3)},
        {"train_batch_size": ""}),
    "axolotl zero1_torch_compile": (
        {**zero(stage=1, overlap_comm=True), **HALF, **BATCHES, "compile": {"disable": False,
         "backend": "inductor"}},
        {"compile": "remove it"}),
    "axolotl zero2_torch_compile": (
        {**zero(stage=2, **OVERLAPPED), **HALF, **BATCHES, "compile": {"disable": False}},
        {"compile": "remove it"}),
    "axolotl autotp": (
        {**zero(stage=1), **BATCHES, "tensor_parallel": {"autotp_size": 4}},
        {"tensor_parallel": "set parallel.tensor there"}),
    "axolotl fp8": (
        {**zero(stage=1), **BATCHES, "comms_config": {"verbose": False}, "monitor_config": {}},
        {"comms_config": "", "monitor_config": ""}),
    "LLaMA-Factory #1949": (
        {**BATCHES, **zero(**SHARDED), "bf16": {**FP16, "enabled": "auto"}},
        {f"bf16.{key}": "" for key in FP16 if key != "enabled"}),
}  # fmt: skip
"""By name: the file, and the keys that it is refused for with what the message tells to do."""

TEMPLATES = {
    "Megatron-DeepSpeed TEMPLATE": '{\n  "train_batch_size": GBSIZE,\n  "steps_per_print": 1\n}',
    "Megatron-DeepSpeed TEMPLATE 2": '{\n  "zero_optimization": {"stage": ZERO_STAGE}\n}',
}


def test_so_many_were_looked_at() -> None:
    assert len(TAKEN) + len(REFUSED) + len(TEMPLATES) == 37


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return load_run_config("configs/run/llama_60m_relora.yaml").config


@pytest.mark.parametrize("name", TAKEN)
def test_taken_as_it_is(config: RunConfig, name: str) -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    resolved = resolve_deepspeed_config(TAKEN[name], config, 1)
    assert "auto" not in str(resolved.deepspeed)
    theirs = runtime.DeepSpeedConfig(resolved.deepspeed)
    assert theirs.zero_optimization_stage == TAKEN[name]["zero_optimization"]["stage"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_key_and_no_other(config: RunConfig, name: str) -> None:
    source, expected = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed_config(source, config, 1)
    found = {}
    for problem in error.value.problems:
        _, key, message = problem.split(": ", 2)
        found[key] = message
    assert found.keys() == expected.keys(), error.value.problems
    for key, words in expected.items():
        assert words in found[key]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_no_json(config: RunConfig, name: str, tmp_path: Any) -> None:
    path = tmp_path / "template.json"
    path.write_text(TEMPLATES[name])
    with pytest.raises(ConfigError, match=r"template\.json:2: "):
        resolve_deepspeed_config(path, config, 1)
