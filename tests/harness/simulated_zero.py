"""The layouts of all ZeRO stages on a device that is not there: rank 0 of two, without processes.

Values are absent, so collectives do nothing; what they ask of the host does not depend on values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn

from relora_ds.engine.deepspeed.layouts import FlatPartitions, PartitionedParameters
from relora_ds.engine.zero.layout import Layout, MasterCopies
from relora_ds.optim.vector_adamw import MOMENTS, VectorAdamW
from relora_ds.parallel.shape import keep_tp_local_shape, slice_of
from tests.harness.device_costs import DEVICE

SIZE = 2


@contextmanager
def rank_of_two() -> Iterator[None]:
    """torch.distributed as rank 0 of two sees it, with collectives that move nothing."""

    def nothing(*tensors: Any, **options: Any) -> None:
        pass

    def everywhere_alike(objects: list[Any], mine: object) -> None:
        objects[:] = [mine] * SIZE

    answers: dict[str, Any] = {
        "get_rank": lambda group=None: 0,
        "get_world_size": lambda group=None: SIZE,
        "all_reduce": nothing,
        "broadcast": nothing,
        "reduce": nothing,
        "all_gather_into_tensor": nothing,
        "all_gather_object": everywhere_alike,
    }
    with patch.multiple(torch.distributed, **answers):
        yield


@dataclass
class _Flat:
    """What the layout of stages 1 and 2 reads of DeepSpeed's wrapper."""

    averaged_gradients: dict[int, Any] = field(default_factory=dict)
    all_grad_tensors: dict[int, Any] = field(default_factory=dict)


@dataclass
class _Cut:
    """What the layout of stage 3 reads of DeepSpeed's wrapper."""

    fp32_partitioned_groups_flat: list[torch.Tensor]
    grad_position: Mapping[int, list[int]]
    ids: Mapping[nn.Parameter, int]
    averaged_gradients: dict[int, Any] = field(default_factory=dict)

    def get_param_id(self, param: nn.Parameter) -> int:
        return self.ids[param]


def layout_of(model: nn.Module, stage: int) -> Layout:
    """The layout of a model's parameters, in one group, after updates: there are moments.

    Args:
        model: on the device, in bf16. Its parameters are laid out as the stage does.
        stage: of ZeRO; masters are in fp32.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    build = {0: _copies, 1: _flat, 2: _flat, 3: _cut}[stage]
    layout, optimizer = build(model, trained)
    for owner in layout.owners():
        optimizer.state[owner] = {key: torch.zeros_like(owner) for key in MOMENTS}
    return layout


def _copies(model: nn.Module, trained: Sequence[nn.Parameter]) -> tuple[Layout, VectorAdamW]:
    optimizer = VectorAdamW([p.detach().float() for p in trained])
    return MasterCopies([trained], optimizer, None), optimizer


def _flat(model: nn.Module, trained: Sequence[nn.Parameter]) -> tuple[Layout, VectorAdamW]:
    length = -(-sum(p.numel() for p in trained) // SIZE)
    working = torch.zeros(SIZE * length, dtype=torch.bfloat16, device=DEVICE)
    offset = 0
    for parameter in trained:
        parameter.data = working[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    optimizer = VectorAdamW([working[:length].float()])
    return FlatPartitions([trained], optimizer, cast(Any, "pair"), cast(Any, _Flat())), optimizer


def _cut(model: nn.Module, trained: Sequence[nn.Parameter]) -> tuple[Layout, VectorAdamW]:
    for parameter in model.parameters():
        mine: Any = parameter
        mine.ds_numel = parameter.numel()
        share = -(-parameter.numel() // SIZE)
        mine.ds_tensor = torch.zeros(share, dtype=torch.bfloat16, device=DEVICE)
        mine.ds_secondary_tensor = None
        keep_tp_local_shape(parameter)
        parameter.data = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    positions, offset = {}, 0
    for number, parameter in enumerate(trained):
        _, length = slice_of(cast(Any, parameter).ds_numel, 0, SIZE)
        positions[number] = [0, offset, length]
        offset += length
    optimizer = VectorAdamW([torch.zeros(offset, device=DEVICE)])
    flats = optimizer.param_groups[0]["params"]
    wrapper = _Cut(flats, positions, {p: number for number, p in enumerate(trained)})
    group = cast(Any, "pair")
    return PartitionedParameters([trained], optimizer, group, cast(Any, wrapper)), optimizer
