"""Ranks as threads: enough for code whose only communication is a sum that it is handed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
Sum = Callable[[torch.Tensor], None]


def on_ranks(size: int, function: Callable[[int, Sum], T]) -> list[T]:
    """`function(rank, sum_over_ranks)` on every rank; its results in order of rank."""
    barrier = threading.Barrier(size, timeout=60)
    parts: list[torch.Tensor] = [torch.empty(0)] * size

    def run(rank: int) -> T:
        def sum_over_ranks(tensor: torch.Tensor) -> None:
            parts[rank] = tensor.clone()
            barrier.wait()
            assert len({part.shape for part in parts}) == 1
            total = torch.stack(parts).sum(dim=0)
            barrier.wait()  # nobody overwrites a part that another rank has yet to read
            tensor.copy_(total)

        try:
            return function(rank, sum_over_ranks)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    return [future.result() for future in futures]
