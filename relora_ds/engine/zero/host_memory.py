"""Host memory of which the processes of a node share one copy, and the port `HostMemory` on it.

It lives in an anonymous file (memfd): no name in any directory, no limit but memory, and nothing
that stays behind when processes die.
"""

from __future__ import annotations

import functools
import logging
import math
import mmap
import os
import socket
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from relora_ds.engine.zero.collectives import StateCollectives
from relora_ds.engine.zero.layout import Layout
from relora_ds.methods.train_state import HostMemory
from relora_ds.parallel.shape import slice_of

_logger = logging.getLogger(__name__)


class NodeMemory:
    """Zero-filled tensors in memory that grows and is kept until all of them are gone.

    A collective to construct. Afterwards every process of the node asks for the same tensors in the
    same order, without communication: the file grows to the same size whoever is first.

    Args:
        shared: False gives each process memory of its own.
        part: processes share with those that give the same number.
    """

    def __init__(self, shared: bool, part: int = 0) -> None:
        self.is_writer = True
        """Whether this process is the one that fills the tensors."""
        self._file: int | None = None
        self._size = 0
        self._copies = 1
        if torch.distributed.get_world_size() > 1:
            self._join(shared, part)
        if self._file is not None:
            # tensors keep their mappings; the file goes with the last of them
            weakref.finalize(self, os.close, self._file)

    def _join(self, shared: bool, part: int) -> None:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = os.memfd_create("relora_ds")
        place = f"{_node()} {part}"
        everyone: list[tuple[str, int, int]] = [("", 0, 0)] * size
        torch.distributed.all_gather_object(everyone, (place, os.getpid(), mine))
        here = [number for number, (other, _, _) in enumerate(everyone) if other == place]
        if not shared:
            os.close(mine)
            self._copies = len(here)
            return
        first = here[0]
        self.is_writer = first == rank
        if self.is_writer:
            self._file = mine
            return
        _, process, descriptor = everyone[first]
        os.close(mine)
        try:
            self._file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
        except OSError as error:
            _logger.warning(
                "process %d's memory cannot be shared (%s): this one keeps a copy of its own",
                process,
                error,
            )
            self.is_writer = True

    @property
    def bytes_on_node(self) -> int:
        """Host memory behind all tensors so far, over all processes of the node."""
        return self._size * self._copies

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros; pinned where there is a GPU."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.zeros(tuple(shape), dtype=dtype)
        space = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._file is None:
            memory = mmap.mmap(-1, space)
        else:
            # takes the pages now: without memory this fails, where a later write would be killed;
            # it never shrinks the file, so it does not matter which process comes first
            os.posix_fallocate(self._file, self._size, space)
            memory = mmap.mmap(self._file, space, offset=self._size)
        self._size += space
        flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape))
        if torch.cuda.is_initialized():
            _pin(flat, space)
        return flat.view(tuple(shape))


def _pin(flat: torch.Tensor, space: int) -> None:
    """Let the GPU copy from and to memory by itself, until the tensor's storage goes; where the
    system refuses, copies are slower."""
    runtime: Any = torch.cuda.cudart()
    address = flat.data_ptr()
    problem = int(runtime.cudaHostRegister(address, space, 0))
    if problem:
        # or the next call of anybody reports it
        runtime.cudaGetLastError()
        _warn_of_pageable_memory(space, problem)
        return
    # the same address may be mapped again, and must not be registered then
    weakref.finalize(flat.untyped_storage(), runtime.cudaHostUnregister, address)


@functools.cache
def _warn_of_pageable_memory(space: int, problem: int) -> None:
    _logger.warning(
        "%d bytes of host memory cannot be pinned (CUDA error %d), copies from them are slower: "
        "raise the limit on locked memory (ulimit -l unlimited)",
        space,
        problem,
    )


class ZeroHostMemory(HostMemory):
    """Vectors beside the model, sliced over the ranks that ZeRO slices working weights over.

    Args:
        layout: knows whether and over whom weights are sliced.
        collectives: sums over those ranks.
    """

    def __init__(self, layout: Layout, collectives: StateCollectives) -> None:
        self._layout = layout
        self._collectives = collectives
        self._node_memory: NodeMemory | None = None

    def span(self, length: int) -> tuple[int, int]:
        if not self._layout.weights_sharded:
            return 0, length
        group = self._layout.partition_group
        size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        start, count = slice_of(length, rank, size)
        return start, start + count

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._memory().tensor(shape, dtype)

    @property
    def is_writer(self) -> bool:
        return self._memory().is_writer

    @property
    def node_bytes(self) -> int:
        return 0 if self._node_memory is None else self._node_memory.bytes_on_node

    def _memory(self) -> NodeMemory:
        if self._node_memory is None:
            shared = not self._layout.weights_sharded
            self._node_memory = NodeMemory(shared, part=self._collectives.tp.rank)
        return self._node_memory

    def collect(self, part: torch.Tensor, length: int) -> torch.Tensor | None:
        is_main = torch.distributed.get_rank(self._collectives.tp.data_group) == 0
        if self._layout.weights_sharded:
            device = self._collectives.device
            whole = torch.zeros(len(part), length, dtype=part.dtype, device=device)
            whole[:, slice(*self.span(length))] = part.to(device)
            part = self._collectives.sum_over_slices(whole)
        return part.cpu() if is_main else None


def _node() -> str:
    """Differs between machines, and between containers that do not see each other's processes."""
    return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
