"""ZeRO settings are what the dictionary says, and the defaults of DeepSpeed where it is silent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from relora_ds.config.load import load_run_config
from relora_ds.config.schema import RunConfig
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.parallel.zero import Gathering, ZeroSettings

ROOT = Path(__file__).parents[4]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return load_run_config("configs/run/quickstart.yaml").config


def test_settings_are_what_the_dictionary_says(config: RunConfig) -> None:
    source = {
        "communication_data_type": "bf16",
        "bf16": {"check_grad_overflow": False},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 11.0,
            "overlap_comm": True,
            "reduce_scatter": False,
            "use_multi_rank_bucket_allreduce": False,
            "sub_group_size": 12,
            "stage3_prefetch_bucket_size": 13,
            "stage3_param_persistence_threshold": 14,
            "stage3_max_reuse_distance": 15,
            "stage3_max_live_parameters": 16,
            "zero_hpz_partition_size": 2,
            "stage3_use_all_reduce_for_fetch_params": True,
            "stage3_module_granularity_threshold": 17,
            "stage3_model_persistence_threshold": 18,
            "enable_sanity_checks": True,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        },
    }
    train = config.train.model_copy(update={"precision": "bf16"})
    found = resolve_deepspeed_config(source, config.model_copy(update={"train": train}), 2)
    assert replace(found, deepspeed={}) == ZeroSettings(
        stage=3,
        dtype=torch.bfloat16,
        accumulation=1,
        micro_batch_size=4,
        global_batch_size=8,
        clip=1.0,
        communication_dtype=torch.bfloat16,
        checks_overflow=False,
        reduce_bucket=11,
        overlaps=True,
        reduce_scatter=False,
        joins_owners=False,
        sub_group=12,
        gathering=Gathering(13, 14, 15, 16, 2),
        gathers_by_all_reduce=True,
        module_granularity=17,
        model_persistence=18,
        sanity_checks=True,
        offloads_optimizer=True,
        offloads_weights=True,
    )
    assert found.dp_size == 2
    assert found.element_size == 2


def test_what_is_not_said_is_deepspeeds_default(config: RunConfig) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig()
    found, gathering = ZeroSettings(stage=0), Gathering()
    assert found.reduce_bucket == zero.reduce_bucket_size
    assert found.reduce_scatter == zero.reduce_scatter
    assert found.joins_owners == zero.use_multi_rank_bucket_allreduce
    assert found.sub_group == zero.sub_group_size
    assert found.module_granularity == zero.module_granularity_threshold
    assert found.gathers_by_all_reduce == zero.use_all_reduce_for_fetch_params
    assert found.sanity_checks == zero.enable_sanity_checks
    assert (gathering.prefetch, gathering.persistence) == (
        zero.prefetch_bucket_size,
        zero.param_persistence_threshold,
    )
    assert (gathering.reuse_distance, gathering.live, gathering.hpz) == (
        zero.max_reuse_distance,
        zero.max_live_parameters,
        zero.zero_hpz_partition_size,
    )
    types = {"offload_optimizer": {"device": "none"}, "reduce_scatter": None}
    resolved = resolve_deepspeed_config({"zero_optimization": types}, config, 2)
    assert not resolved.offloads_optimizer
    assert resolved.reduce_scatter
    assert resolved.gathering == gathering
    assert resolved.gradient_dtype == resolved.dtype == torch.float32


@pytest.mark.parametrize(
    ("stage", "reduction", "batch", "once"),
    [
        (2, "step", 8, True),
        (3, "step", 8, True),
        (1, "step", 8, False),
        (2, "step", 4, False),
        (2, "micro_batch", 8, False),
    ],
)
def test_gradients_are_held_back_only_where_they_would_be_reduced_more_than_once(
    config: RunConfig, stage: int, reduction: str, batch: int, once: bool
) -> None:
    update = {"gradient_reduction": reduction, "global_batch_size": batch}
    changed = config.model_copy(update={"train": config.train.model_copy(update=update)})
    source = {"zero_optimization": {"stage": stage}}
    assert resolve_deepspeed_config(source, changed, 1).reduces_once == once
