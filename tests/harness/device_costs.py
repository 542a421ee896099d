"""A device that is not there: what code would do to a GPU, counted on tensors without values.

`meta` stands for the GPU, while tensors on the CPU stay what they are, so that the host's own
arithmetic runs as ever. Reading a value is answered with a number that the test chooses, and
counted as a wait; so are copies between both sides, but for those that are queued from or to pinned
memory of the host. Tensors of both sides in one operation are an error, as they are on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
_FREE = ("prim::", "empty", "new_empty", "detach", "_unsafe_view")
_CHECKED = ("_linalg_eigh", "_linalg_svd", "cholesky_inverse")
"""Operations of which the host looks whether they converged or found what they divide by."""
_INDEXED = ("index", "index_put_", "_index_put_impl_", "_unsafe_index")


@dataclass
class Costs:
    """What was asked of the device, by name of the operation."""

    launches: list[str] = field(default_factory=list)
    """Operations that compute or copy; views and allocations cost no kernel."""
    waits: list[str] = field(default_factory=list)
    """Reads for which the host waits until the device has done all that was queued."""
    blocking: list[str] = field(default_factory=list)
    """Copies from the host's pageable memory, for which the host waits however they are asked
    for."""
    queued: list[str] = field(default_factory=list)
    """Copies in either direction that were asked for as non-blocking and are."""


_PINNED: dict[int, torch.UntypedStorage] = {}
"""Memory that the device could copy from by itself; kept, so that no other gets its address."""


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Have a tensor's memory count as pinned from now on, all of it."""
    storage = tensor.untyped_storage()
    _PINNED[storage.data_ptr()] = storage
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _PINNED


_OF_PINNED: dict[str, Callable[[torch.Tensor], Any]] = {
    "is_pinned": _is_pinned,
    "_pin_memory": lambda tensor: pin(tensor.clone()),
}


class MixedDevicesError(AssertionError):
    """An operation has tensors of the host and of the device."""


class SimulatedDevice(TorchDispatchMode):
    """Counts what happens on `DEVICE` while it is active.

    Args:
        reading: the value of every element that is read.
    """

    def __init__(self, reading: float = 1.0) -> None:
        super().__init__()
        self.reading = reading
        self.costs = Costs()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords: dict[str, Any] = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in _OF_PINNED:
            return _OF_PINNED[name](args[0])
        tensors = list(tensors_in((args, keywords)))
        here = [t for t in tensors if t.device == DEVICE]
        there = [t for t in tensors if t.device.type == "cpu" and t.dim() > 0]
        if name == "_local_scalar_dense" and here:
            self.costs.waits.append(name)
            return _number(here[0].dtype, self.reading)
        if here and (found := _sized_by_values(name, args, here)) is not None:
            self.costs.waits.append(name)
            return found
        if here and name in _CHECKED:
            self.costs.waits.append(name)
        if name == "_to_copy":
            return self._moved(func, args[0], args, keywords)
        if name == "copy_" and args[0].device != args[1].device:
            return self._copied(args[0], args[1], args[2] if len(args) > 2 else False, keywords)
        if here and there:
            if name not in _INDEXED or args[0].device != DEVICE:
                raise MixedDevicesError(
                    f"{func.name()} of {[(t.device, t.shape) for t in tensors]}"
                )
            # torch takes an index of the host to the device first
            self.costs.blocking += [name] * len(there)
            args = _taken(args)
            keywords = _taken(keywords)
        made = keywords.get("device")
        takes_part = here or (made is not None and torch.device(made) == DEVICE)
        if takes_part and not (func.is_view or name.startswith(_FREE)):
            self.costs.launches.append(name)
        return func(*args, **keywords)

    def _moved(self, func: Any, source: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        target = torch.device(kwargs.get("device") or source.device)
        if target == source.device:
            if source.device == DEVICE:
                self.costs.launches.append("_to_copy")
            return func(*args, **kwargs)
        if target == DEVICE:
            self._note_upload(source, bool(kwargs.get("non_blocking")))
            return func(*args, **kwargs)
        self.costs.waits.append("_to_copy")
        dtype = kwargs.get("dtype") or source.dtype
        return torch.full(source.shape, _number(dtype, self.reading), dtype=dtype)

    def _copied(
        self, target: torch.Tensor, source: torch.Tensor, queued: bool, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        queued = queued or bool(kwargs.get("non_blocking"))
        if target.device == DEVICE:
            self._note_upload(source, queued)
        elif queued and _is_pinned(target):
            self.costs.queued.append("copy_")
        else:
            self.costs.waits.append("copy_")
        return target

    def _note_upload(self, source: torch.Tensor, queued: bool) -> None:
        queued = queued and _is_pinned(source)
        (self.costs.queued if queued else self.costs.blocking).append("upload")


def _sized_by_values(name: str, args: Any, here: list[torch.Tensor]) -> torch.Tensor | None:
    """The largest result of an operation that has a size which depends on values; None for any
    other."""
    if name == "bincount":  # it looks for the largest value
        return torch.empty(args[2], dtype=torch.int64, device=DEVICE)
    if name == "index" and any(tensor.dtype == torch.bool for tensor in here[1:]):
        return args[0]
    return None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a nest of lists, tuples and dictionaries, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _taken(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.device == DEVICE else torch.empty_like(value, device=DEVICE)
    if isinstance(value, (list, tuple)):
        return type(value)(_taken(item) for item in value)
    if isinstance(value, dict):
        return {key: _taken(item) for key, item in value.items()}
    return value


def _number(dtype: torch.dtype, value: float) -> float | int | bool:
    if dtype == torch.bool:
        return bool(value)
    return value if dtype.is_floating_point else int(value)
