"""ZeRO JSONs as other trainers ship them are taken as they are; what contradicts a run is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ds.config.load import load_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.deepspeed.reading.foreign import _FIELD_NAMES
from relora_ds.errors import ConfigError
from relora_ds.parallel.zero import Gathering

ROOT = Path(__file__).parents[5]

BATCHES = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
OPTIMIZER = {
    "type": "AdamW",
    "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
}
WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
STAGE_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
}
FIELD_NAMES = {
    "prefetch_bucket_size": "auto",
    "param_persistence_threshold": "auto",
    "max_live_parameters": 1e8,
    "max_reuse_distance": 1e7,
    "gather_16bit_weights_on_model_save": True,
}
ALIASES = {f"stage3_{name}": value for name, value in FIELD_NAMES.items()}
HOST = {"device": "cpu", "pin_memory": True}
SHIPPED: dict[str, dict[str, Any]] = {
    "thresholds left open": {
        **BATCHES,
        "zero_allow_untested_optimizer": True,
        "fp16": FP16,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {**STAGE_3, **ALIASES},
    },
    "optimizer and schedule left open": {
        **BATCHES,
        "bf16": {"enabled": "auto"},
        "optimizer": OPTIMIZER,
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys((*WARMUP, "total_num_steps"), "auto"),
        },
        "zero_optimization": {**STAGE_3, **ALIASES, "offload_param": HOST},
        "steps_per_print": 5,
        "wall_clock_breakdown": False,
    },
    "names of fields, host memory": {
        **BATCHES,
        "bf16": {"enabled": "auto"},
        "fp16": {**FP16, "auto_cast": False},
        "zero_optimization": {
            **STAGE_3,
            **FIELD_NAMES,
            "offload_optimizer": HOST,
            "offload_param": HOST,
        },
    },
    "constant schedule, a comment": {
        "_comment": "for eight devices",
        **BATCHES,
        "optimizer": OPTIMIZER,
        "scheduler": {"type": "WarmupLR", "params": dict.fromkeys(WARMUP, "auto")},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "overlap_comm": "auto",
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
        },
        "steps_per_print": 1e5,
    },
    "devices left open, disk settings unused": {
        **BATCHES,
        "zero_optimization": {
            **STAGE_3,
            "offload_optimizer": {"device": "auto", "nvme_path": "auto"},
            "offload_param": {"device": "auto"},
        },
        "aio": {"block_size": 262144, "queue_depth": 32},
    },
}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return load_run_config("configs/run/llama_60m_relora.yaml").config


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_taken_as_it_is(config: RunConfig, name: str) -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    resolved = resolve_deepspeed_config(SHIPPED[name], config, 1)
    assert resolved.stage == SHIPPED[name]["zero_optimization"]["stage"]
    assert "auto" not in str(resolved.deepspeed)
    assert runtime.DeepSpeedConfig(resolved.deepspeed).zero_optimization_stage == resolved.stage


def test_what_is_left_open_is_the_default_and_names_of_fields_mean_their_aliases(
    config: RunConfig,
) -> None:
    by_alias, by_field = (
        resolve_deepspeed_config({"zero_optimization": {**STAGE_3, **names}}, config, 1)
        for names in (ALIASES, FIELD_NAMES)
    )
    assert by_alias == by_field
    expected = Gathering(live=10**8, reuse_distance=10**7)
    assert by_alias.gathering == expected


def test_field_names_are_those_of_the_installed_deepspeed() -> None:
    module = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = module.DeepSpeedZeroConfig.model_fields.items()
    renamed = {name: field.alias for name, field in fields if field.alias not in (None, name)}
    assert renamed == _FIELD_NAMES


def test_a_device_left_open_offloads_nothing(config: RunConfig) -> None:
    zero = SHIPPED["devices left open, disk settings unused"]["zero_optimization"]
    resolved = resolve_deepspeed_config({"zero_optimization": zero}, config, 1)
    assert not resolved.offloads_optimizer
    assert not resolved.offloads_weights


def test_blocks_may_repeat_the_run(config: RunConfig) -> None:
    optimizer, schedule = config.optimizer, config.schedule
    source = {
        "optimizer": {
            "type": "Adam",
            "params": {"lr": optimizer.lr, "betas": list(optimizer.betas), "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "warmup_num_steps": schedule.warmup_steps,
                "total_num_steps": config.train.steps,
                "cos_min_ratio": "auto",
            },
        },
    }
    assert not {"optimizer", "scheduler"} & set(
        resolve_deepspeed_config(source, config, 1).deepspeed
    )


@pytest.mark.parametrize(
    ("source", "key", "part"),
    [
        ({"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, "optimizer.type", '"Lamb"'),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 5e-5}}},
            "optimizer.params.lr",
            "is 5e-05, but it is 0.001 here",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"freeze_step": 3}}},
            "optimizer.params.freeze_step",
            "set optimizer.* there",
        ),
        ({"optimizer": {"type": "Adam", "legacy_fusion": True}}, "optimizer", "more than a type"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}},
            "scheduler.params.warmup_num_steps",
            "it is 500 here",
        ),
        (
            {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}},
            "zero_optimization.max_live_parameters",
            "is 1, but stage3_max_live_parameters is 2: remove one of them",
        ),
    ],
)
def test_a_contradiction_is_named(
    config: RunConfig, source: dict[str, Any], key: str, part: str
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed_config(source, config, 1)
    (problem,) = error.value.problems
    assert problem.startswith(f"DeepSpeed configuration: {key}: ")
    assert part in problem


def test_a_renamed_key_keeps_its_line(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {\n"stage": 3,\n"max_reuse_distance": "far"}}')
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed_config(path, config, 1)
    (problem,) = error.value.problems
    assert problem.startswith(f"{path}:3: zero_optimization.stage3_max_reuse_distance: is ")
