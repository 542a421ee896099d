"""Gradients of ZeRO stages 1 and 2 that lie where the update reads them.

DeepSpeed copies a gradient into a bucket, out of it into what this rank updates, out of that into a
flat tensor, and takes the norm of a copy in fp64. Here one tensor per optimizer group holds the
gradients in the order of the flat weights: backward passes write into it, reductions work on
stretches of it, and the update reads this rank's slice of it. It lives as long as the engine.

It applies where whole gradients are kept until the update: at stage 1 without overlap, and at
stages 1 and 2 with a single data-parallel process. Everything else is left to DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import nn

from relora_ds.numerics.products import offer_place

_STRETCH = 1 << 16
"""Elements of which a host adds up squares in one go."""


def use_flat_gradients(wrapper: object) -> None:
    """Change how DeepSpeed's optimizer wrapper keeps gradients, where that is possible.

    Args:
        wrapper: `engine.optimizer` after `deepspeed.initialize`, of any kind.
    """
    if type(wrapper) is not DeepSpeedZeroOptimizer:
        return
    found: Any = wrapper
    if found.cpu_offload or found.use_grad_accum_attribute:
        return
    single = torch.distributed.get_world_size(found.dp_process_group) == 1
    if single or not (found.partition_gradients or found.overlap_comm):
        # the engine builds its wrapper by itself and offers no other way in
        found.__class__ = FlatGradientOptimizer
        cast(FlatGradientOptimizer, wrapper).lay_out()


class FlatGradientOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's wrapper of stages 1 and 2 with gradients in flat tensors of their own."""

    flats: list[torch.Tensor]
    """Gradients by group, those of other ranks' parts and the padding included."""

    def lay_out(self) -> None:
        """Allocate the gradients, in the order and with the padding of the flat weights."""
        group: Any = self.dp_process_group
        self._single = torch.distributed.get_world_size(group) == 1
        self._rank = torch.distributed.get_rank(group)
        self.flats = [torch.zeros_like(flat) for flat in self.bit16_groups_flat]
        self._slots: dict[nn.Parameter, torch.Tensor] = {}
        self._given: set[nn.Parameter] = set()
        for flat, parameters in zip(self.flats, self.bit16_groups, strict=True):
            for parameter in parameters:
                start, stop = _span(parameter)
                self._slots[parameter] = flat[start:stop].view(parameter.shape)
                offer_place(parameter, partial(self._place, parameter))

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Called in a backward pass when a gradient is complete: put it in its place."""
        slot = self._slots[param]
        if param.grad is not None and param.grad.data_ptr() != slot.data_ptr():
            slot.copy_(param.grad)
            param.grad = slot  # what the next micro-batch adds to

    def _place(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Where a backward pass writes an update's first gradient of a parameter."""
        if parameter.grad is not None or parameter in self._given:
            return None
        self._given.add(parameter)
        return self._slots[parameter].view(parameter.shape)  # autograd keeps what it alone holds

    def setup_buckets(self) -> None:
        """Called before gradients are reduced: there is nothing to allocate."""

    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        """Called to reduce one gradient: all are reduced at the end of the update."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Called at stage 1 after the last backward pass of an update."""
        self.overlapping_partition_gradients_reduce_epilogue()

    def independent_gradient_partition_epilogue(self) -> None:
        """Called after a backward pass: after an update's last one, reduce and hand over."""
        self._epilogue_ran_this_backward = True
        if not self.is_gradient_accumulation_boundary():
            return
        for i, parameters in enumerate(self.bit16_groups):
            for parameter in parameters:
                if parameter.grad is None:  # no micro-batch used it
                    self._slots[parameter].zero_()
            if not self._single:
                self._reduce(i)
            self.averaged_gradients[i] = self._partition(i)
            self.all_grad_tensors[i] = None
        self._clear_param_grad_only()
        self._given.clear()

    def get_grad_norm_direct(
        self, gradients: Sequence[torch.Tensor], params: Sequence[nn.Parameter], norm_type: int = 2
    ) -> torch.Tensor:
        """Norm of one group's gradients over all processes, fp32; -1 if it is not finite."""
        everything = is_model_parallel_parameter
        first = self.model_parallel_rank == 0
        counted = [g for g, p in zip(gradients, params, strict=False) if first or everything(p)]
        if len(counted) == len(params) and params:
            counted = [cast(GradPartitionBufferGroup, gradients).flat_partition]
        squares = [flat_norm(piece).square() for piece in counted]
        total = (
            torch.stack(squares).sum().float() if squares else torch.zeros((), device=self.device)
        )
        torch.distributed.all_reduce(total, group=self.dp_process_group)
        self._model_parallel_all_reduce(total, torch.distributed.ReduceOp.SUM)
        norm = total.sqrt()
        return torch.where(norm.isfinite(), norm, -1.0)

    def unscale_and_clip_grads(
        self, grad_groups_flat: list[torch.Tensor], total_norm: torch.Tensor
    ) -> None:
        """Limit the norm. A host, for which reading a norm is free, skips products with 1."""
        readable = total_norm.device.type == "cpu" and self.loss_scale == 1.0
        if readable and total_norm >= 0.0 and (total_norm + 1e-6) / self.clip_grad <= 1.0:
            return
        super().unscale_and_clip_grads(grad_groups_flat, total_norm)

    def destroy(self) -> None:
        """Take the hooks off the parameters and let go of the gradients."""
        super().destroy()
        self.flats.clear()
        for parameter in self._slots:
            offer_place(parameter, None)
        self._slots.clear()

    def _reduce(self, i: int) -> None:
        """Average one group's gradients over the processes, by as many collectives as DeepSpeed."""
        flat, dtype = self.flats[i], self.communication_data_type
        held: Any = self.ipg_buckets[dtype]
        for parameters in self._buckets(i):
            # it looks up there which stretches of a tensor are whose
            held.params.extend((i, p.param_idx_in_group, self.get_param_id(p)) for p in parameters)
            self.average_tensor(flat[_span(parameters[0])[0] : _span(parameters[-1])[1]], dtype)
            held.clear()

    def _buckets(self, i: int) -> Iterator[list[Any]]:
        """Neighbouring parameters, together no larger than a bucket unless there is only one."""
        bucket: list[Any] = []
        elements = 0
        for parameter in self.bit16_groups[i]:
            if bucket and elements + parameter.numel() > self.reduce_bucket_size:
                yield bucket
                bucket, elements = [], 0
            bucket.append(parameter)
            elements += parameter.numel()
        if bucket:
            yield bucket

    def _partition(self, i: int) -> GradPartitionBufferGroup:
        """This rank's gradients: of each parameter that it updates some of, then the padding."""
        size = int(self.partition_size[i])
        first = self._rank * size
        own = self.flats[i][first : first + size]
        pieces, end = [], 0
        for parameter in self.params_in_partition[i]:
            start, stop = _span(parameter)
            end = min(stop - first, size)
            pieces.append(own[max(start - first, 0) : end])
        if end < size:
            pieces.append(own[end:])
        return GradPartitionBufferGroup(pieces, own)


def _span(parameter: nn.Parameter) -> tuple[int, int]:
    """Where a parameter lies in its group's flat weights: first element and the one behind."""
    first = int(parameter.data.storage_offset())
    return first, first + parameter.numel()


def flat_norm(flat: torch.Tensor) -> torch.Tensor:
    """Norm of a 1-D tensor, summed up and returned in fp64, as DeepSpeed sums it.

    A host works on a stretch at a time: a copy of all of it in fp64 would leave its caches.
    """
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for part in flat.split(_STRETCH):
        wide = part.double()
        squares += torch.dot(wide, wide)
    return squares.sqrt()
