"""The dictionary that DeepSpeed gets -> `ZeroSettings`: nothing else looks keys up in it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.zero import Gathering, ZeroSettings


class _Section:
    """A section of the JSON; what is absent or null has the default."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content

    def number(self, key: str, default: int) -> int:
        value = self._content.get(key)
        return default if value is None else int(value)

    def switch(self, key: str, default: bool) -> bool:
        value = self._content.get(key)
        return default if value is None else bool(value)


def read_settings(resolved: dict[str, Any], gradient_reduction: str) -> ZeroSettings:
    """The settings in a resolved dictionary.

    Args:
        resolved: what DeepSpeed gets, without "auto".
        gradient_reduction: `train.gradient_reduction` of the run.
    """
    content, default = resolved["zero_optimization"], ZeroSettings
    zero, bf16 = _Section(content), _Section(resolved["bf16"])
    stage, accumulation = int(content["stage"]), int(resolved["gradient_accumulation_steps"])
    travels = resolved.get("communication_data_type")
    persistence = content.get("stage3_model_persistence_threshold")
    offloads = not is_off(content.get("offload_optimizer"))
    once = gradient_reduction == "step" and accumulation > 1 and stage >= 2 and not offloads
    return ZeroSettings(
        stage=stage,
        dtype=DTYPES["bf16" if bf16.switch("enabled", False) else "fp32"],
        accumulation=accumulation,
        micro_batch_size=int(resolved["train_micro_batch_size_per_gpu"]),
        global_batch_size=int(resolved["train_batch_size"]),
        clip=float(resolved["gradient_clipping"]),
        communication_dtype=None if travels is None else DTYPES[travels],
        reduces_once=once,
        checks_overflow=bf16.switch("check_grad_overflow", default.checks_overflow),
        reduce_bucket=zero.number("reduce_bucket_size", default.reduce_bucket),
        overlaps=zero.switch("overlap_comm", default.overlaps),
        reduce_scatter=zero.switch("reduce_scatter", default.reduce_scatter),
        joins_owners=zero.switch("use_multi_rank_bucket_allreduce", default.joins_owners),
        sub_group=zero.number("sub_group_size", default.sub_group),
        gathering=_gathering(zero),
        gathers_by_all_reduce=zero.switch(
            "stage3_use_all_reduce_for_fetch_params", default.gathers_by_all_reduce
        ),
        module_granularity=zero.number(
            "stage3_module_granularity_threshold", default.module_granularity
        ),
        model_persistence=None if persistence is None else int(persistence),
        sanity_checks=zero.switch("enable_sanity_checks", default.sanity_checks),
        offloads_optimizer=offloads,
        offloads_weights=not is_off(content.get("offload_param")),
        deepspeed=resolved,
    )


def _gathering(zero: _Section) -> Gathering:
    default = Gathering
    return Gathering(
        prefetch=zero.number("stage3_prefetch_bucket_size", default.prefetch),
        persistence=zero.number("stage3_param_persistence_threshold", default.persistence),
        reuse_distance=zero.number("stage3_max_reuse_distance", default.reuse_distance),
        live=zero.number("stage3_max_live_parameters", default.live),
        hpz=zero.number("zero_hpz_partition_size", default.hpz),
    )


def is_off(block: object) -> bool:
    """Whether a block of the JSON is absent or switches its feature off."""
    if isinstance(block, dict):
        return block.get("enabled") in (False, "auto") or block.get("device") == "none"
    return block is None or block is False
