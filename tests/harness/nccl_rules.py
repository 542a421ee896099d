"""NCCL's rules on gloo: collectives of the device's groups that NCCL would refuse are errors here.

NCCL knows no 16-bit integers, takes dense tensors alone, never sees the host's memory, and expects
what is shared out to have the size of all shares. gloo takes more, so that tests on a CPU would not
notice.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.distributed import ProcessGroup

from relora_ds.accounting.collectives import CALLS
from tests.harness.device_costs import tensors_in

_DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)
_WHOLE_FIRST = ("_allgather_base", "all_gather_single")
_WHOLE_SECOND = ("_reduce_scatter_base", "reduce_scatter_single")


class NcclRefusalError(AssertionError):
    """A collective that NCCL would refuse, or that would hang."""


class NcclRules:
    """Checks this process's collectives while it is entered.

    Args:
        host: groups that stay on gloo beside NCCL; anything goes there.
    """

    def __init__(self, host: Iterable[ProcessGroup] = ()) -> None:
        self._host = {group.group_name for group in host}
        self._host_memory: set[int] = set()
        self._originals: dict[str, Any] = {}
        self.checked = 0
        """Collectives that passed."""
        self.began_at: float | None = None
        """When the first of them began, on this machine's clock."""

    def keep_on_host(self, tensor: torch.Tensor) -> None:
        """Say that this memory would be the host's: no collective of the device may touch it."""
        self._host_memory.add(tensor.untyped_storage().data_ptr())

    def __enter__(self) -> NcclRules:
        for name in CALLS:
            if name in vars(ProcessGroup):
                self._originals[name] = vars(ProcessGroup)[name]
                checked = self._checked(getattr(ProcessGroup, name), name)
                setattr(ProcessGroup, name, checked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, original in self._originals.items():
            setattr(ProcessGroup, name, original)
        self._originals = {}

    def _checked(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def checked(group: ProcessGroup, /, *args: Any, **kwargs: Any) -> Any:
            if group.group_name not in self._host:
                for tensor in tensors_in((args, kwargs)):
                    self._check(name, tensor)
                _check_shares(name, group.size(), args)
                self.began_at = self.began_at or time.monotonic()
                self.checked += 1
            return original(group, *args, **kwargs)

        return checked

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        what = f"{name} of {tensor.dtype}, shape {tuple(tensor.shape)}"
        if tensor.dtype not in _DTYPES:
            raise NcclRefusalError(f"{what}: NCCL does not know the type")
        if not tensor.is_contiguous():
            raise NcclRefusalError(f"{what}, strides {tensor.stride()}: it is not contiguous")
        if tensor.untyped_storage().data_ptr() in self._host_memory:
            raise NcclRefusalError(f"{what}: it is in the host's memory")


def _check_shares(name: str, size: int, args: tuple[Any, ...]) -> None:
    """What is gathered or shared out is as large as all shares."""
    if name not in _WHOLE_FIRST + _WHOLE_SECOND:
        return
    first, second = (sum(math.prod(t.shape) for t in tensors_in(value)) for value in args[:2])
    whole, share = (first, second) if name in _WHOLE_FIRST else (second, first)
    if whole != size * share:
        raise NcclRefusalError(f"{name}: {whole} elements are not {size} times {share}")
