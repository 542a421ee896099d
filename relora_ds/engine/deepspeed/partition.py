"""Cutting a model over ranks while it is built, one parameter at a time.

Under ZeRO stage 3 no rank ever holds the whole model: a parameter is allocated, filled, cut and
freed before the next one is allocated.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.accounting.zero_traffic import HPZ_GROUP
from relora_ds.parallel.shape import keep_tp_local_shape, slice_of
from relora_ds.parallel.tensor import SINGLE, TensorParallel, model_parallel_unit
from relora_ds.parallel.zero import ZeroSettings


@dataclass(frozen=True)
class DenseSlices:
    """This rank's slices of the dense model at full precision, cut as ZeRO stage 3 cuts."""

    values: dict[str, torch.Tensor]
    """Flattened slice of every parameter by name, fp32 on the CPU; the partitioner takes them
    out."""

    @staticmethod
    def rest(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What a parameter is filled with before the partitioner adds its slice: zeros."""
        return torch.zeros(shape)


class ZeroPartitioner:
    """Cuts parameters into one slice per data-parallel rank.

    Args:
        zero: settings of stage 3; slices are in working precision.
        slices: dense values that are added to the parameters of the same name. A method's frozen
            or dense weight is the dense weight plus a term of its own, so the slice is enough.
        restored: names of trained parameters whose fp32 values are kept for their masters, besides
            those in `slices`.
        tp: what a parameter was cut over before; its other ranks have slices of their own.
    """

    def __init__(
        self,
        zero: ZeroSettings,
        slices: DenseSlices | None = None,
        restored: Collection[str] = (),
        tp: TensorParallel = SINGLE,
    ) -> None:
        self._group = tp.data_group
        self._init = _LocalInit(
            config_dict_or_path=zero.deepspeed,
            dtype=zero.dtype,
            data_parallel_group=self._group,
            mpu=model_parallel_unit(tp),
        )
        self._dtype = zero.dtype
        self._slices = slices
        self._restored = set(restored) | set(() if slices is None else slices.values)
        self._exact: dict[nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str, parameter: nn.Parameter) -> None:
        """Leave this rank's slice of a filled fp32 parameter in place of the parameter."""
        rank = torch.distributed.get_rank(self._group)
        size = torch.distributed.get_world_size(self._group)
        start, length = slice_of(parameter.numel(), rank, size)
        mine = parameter.data.view(-1)[start : start + length]
        if self._slices is not None and name in self._slices.values:
            mine.add_(self._slices.values.pop(name).to(mine.device))
        kept = name in self._restored or not parameter.requires_grad
        if kept and self._dtype != torch.float32:
            self._exact[parameter] = mine.clone()
        parameter.data = parameter.data.to(self._dtype)
        keep_tp_local_shape(parameter)
        self._init._convert_to_zero_parameters([parameter])
        # padding is never read, but DeepSpeed leaves it uninitialised and writes it to checkpoints
        cast(Any, parameter).ds_tensor.data[length:].zero_()

    def finish(self) -> dict[nn.Parameter, torch.Tensor]:
        """fp32 values of the slices that the cast to the working precision rounded."""
        assert self._slices is None or not self._slices.values, sorted(self._slices.values)[:3]
        return self._exact


class _LocalInit(deepspeed.zero.Init):
    """Every rank draws the same values, so broadcasting the whole model would be for nothing."""

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


def name_hpz_group() -> None:
    """Count what moves between the holders of one of hpZ's copies by itself."""
    group = groups._get_zero_param_intra_parallel_group()
    if isinstance(group, torch.distributed.ProcessGroup):
        recorder.name_group(group, HPZ_GROUP)


def release_stage3() -> None:
    """Drop the global references by which DeepSpeed keeps a destroyed stage-3 engine alive.

    One parameter that is alive keeps all of them alive, masters and moments too.
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # or hpZ cannot be set up a second time
    # an lru_cache on a private method, keyed by (coordinator, module), inside other decorators
    cached = functools._lru_cache_wrapper
    for thing in gc.get_objects():
        # not isinstance: asking lazy objects for their class makes some of them warn
        if type(thing) is cached and thing.__module__.startswith("deepspeed.runtime.zero"):
            thing.cache_clear()


def build_partitioner(
    zero: ZeroSettings,
    slices: DenseSlices | None = None,
    restored: Collection[str] = (),
    tp: TensorParallel = SINGLE,
) -> ZeroPartitioner | None:
    """What cuts the model while it is built; None where every rank keeps it whole."""
    return None if zero.stage < 3 else ZeroPartitioner(zero, slices, restored, tp)
