"""Copies of live values in host memory, so that training can go on while they are written.

Tensors that share memory share it in the copy: a file of the copy has the bytes of a file of the
original. What training stands still for is as little as can be: containers are copied at once,
since the next step changes what is in them; tensors by another thread, while training is in parts
of a step that change none.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from threading import Event
from typing import Any

import torch
from torch import nn

from relora_ds.checkpoint.saving.contents import Contents

_logger = logging.getLogger(__name__)
_PLAIN = frozenset({type(None), bool, int, float, str, bytes, torch.Size, torch.dtype})
"""Types of values that nothing changes."""


class HostBuffers:
    """Host memory of snapshots, kept from one to the next: touching new pages takes longer than
    the copy.

    Args:
        device: where the values are; memory is pinned for CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._free: dict[int, list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of bytes, uint8 of shape (nbytes,); its content is undefined.

        Raises:
            MemoryError: there is not so much memory.
        """
        free = self._free.get(nbytes)
        buffer = free.pop() if free else None
        if buffer is None:
            buffer = self._allocate(nbytes)
        self._used.append(buffer)
        return buffer

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if self._pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                _logger.warning(
                    "host memory for copies of the state cannot be pinned, training waits for "
                    "them: raise the limit on locked memory (ulimit -l unlimited) (%s)",
                    str(error).partition("\n")[0],
                )
                self._pinned = False
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:  # torch's word for it
            raise MemoryError(f"no {nbytes} bytes for a copy of the state: {error}") from error

    def recycle(self) -> None:
        """Give back what is in use; what was free before is let go, as of a phase that is over."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.numel(), []).append(buffer)
        self._used = []


class Snapshot:
    """What a rank has to write, as it was when the snapshot was taken. For the training thread to
    construct.

    On CUDA the copies are queued at once, on a stream of their own into pinned memory; training's
    stream waits for them on the device, and the host waits for nothing.

    Args:
        live: its tensors must not change until `hold` has returned.
        device: where the process computes.
        buffers: what the copies are put into, until they are recycled.

    Raises:
        MemoryError: there is no memory for a copy.
    """

    def __init__(self, live: Contents, device: torch.device, buffers: HostBuffers) -> None:
        self._contents = _Frozen().copy_contents(live)
        self._buffers = buffers
        self._copied = Event()
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._arrived = self._queue(device)

    def _queue(self, device: torch.device) -> torch.cuda.Event:
        training, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        own.wait_stream(training)
        with torch.cuda.stream(own):
            self._contents = _Copier(self._buffers).copy_contents(self._contents)
            arrived = torch.cuda.Event()
            arrived.record(own)
        training.wait_stream(own)  # the next update must not overtake the copies
        self._copied.set()
        return arrived

    def copy(self) -> Contents:
        """The copy, once all of it is in host memory. To be called once, from any thread.

        Raises:
            MemoryError: there is no memory for it.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
            return self._contents
        try:
            return _Copier(self._buffers).copy_contents(self._contents)
        finally:
            self._contents = {}
            self._copied.set()

    def hold(self) -> None:
        """Wait until what the snapshot was taken of may change."""
        self._copied.wait()


class _Copies(ABC):
    """Copies of values; what is the same object stays so."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, object]] = {}
        """By identity: the original, which keeps the identity from being used again, and a copy."""

    @torch.no_grad()
    def copy_contents(self, contents: Contents) -> Contents:
        return {
            name: content.with_values(self._copy(content.values()))
            for name, content in contents.items()
        }

    def _copy(self, value: object) -> Any:
        if type(value) in _PLAIN:
            return value
        seen = self._seen.get(id(value))
        if seen is None:
            seen = self._seen[id(value)] = value, self._copy_new(value)
        return seen[1]

    def _copy_new(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value)
        if isinstance(value, dict):
            twin = copy.copy(value)  # its type, and what a state_dict carries beside its items
            for key, item in value.items():
                twin[key] = self._copy(item)
            return twin
        if type(value) is list:
            return [self._copy(item) for item in value]
        if type(value) is tuple:
            return tuple(self._copy(item) for item in value)
        return _copy_object(value)

    @abstractmethod
    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor: ...


class _Frozen(_Copies):
    """Copies everything but the tensors."""

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class _Copier(_Copies):
    """Copies tensors as well; what shares memory stays so."""

    def __init__(self, buffers: HostBuffers) -> None:
        super().__init__()
        self._buffers = buffers
        self._copies: dict[int, dict[torch.dtype, torch.Tensor]] = {}
        """Of each storage, by identity: the whole of it as elements of a type."""

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        storage, dtype = tensor.untyped_storage(), tensor.dtype
        copies = self._copies.get(storage._cdata) or self._copy_storage(storage)
        flat = copies.get(dtype)
        if flat is None:
            raw = copies[torch.uint8]
            flat = copies[dtype] = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        twin = flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        if type(tensor) is not torch.Tensor and isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin)
        if tensor.requires_grad != twin.requires_grad:
            twin.requires_grad_(tensor.requires_grad)
        if vars(tensor):
            vars(twin).update(self._copy(vars(tensor)))  # what DeepSpeed notes on it
        return twin

    def _copy_storage(self, storage: torch.UntypedStorage) -> dict[torch.dtype, torch.Tensor]:
        buffer = self._buffers.take(storage.nbytes())
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer.copy_(source, non_blocking=True)
        self._copies[storage._cdata] = {torch.uint8: buffer}
        return self._copies[storage._cdata]


def _copy_object(value: object) -> object:
    """A copy of an object of some class; one whose attributes are plain needs no deep copy."""
    attributes = getattr(value, "__dict__", None)
    if attributes and all(type(each) in _PLAIN for each in attributes.values()):
        return copy.copy(value)
    return copy.deepcopy(value)
