"""What the tensors of a training step take up, measured on the live engine during its first step.

Every figure is a sum over distinct storages, so that views and shared buffers count once. What a
kernel allocates and frees within one operation is not seen this way: on a CUDA device the
allocator's peak minus the rest is reported for it, on a host there is no such counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from relora_ds.accounting.memory.use import MemoryUse
from relora_ds.parallel.linear import Projection


class StepStorages(Protocol):
    """Where a rank keeps what an update works with; an engine's layout is one."""

    def weight_storages(self, parameter: nn.Parameter) -> Iterable[torch.Tensor]:
        """Every tensor in which this rank stores a working weight, copies of it too."""
        ...

    def gradient_storages(self) -> Iterable[torch.Tensor]:
        """Every tensor that holds gradients on this rank at this moment."""
        ...

    def owners(self) -> Iterable[torch.Tensor]:
        """Every tensor that the optimizer steps on this rank."""
        ...


class Storages:
    """Bytes of distinct storages."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> Storages:
        """Count tensors whose storage is not known yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return self

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._sizes

    @property
    def bytes(self) -> int:
        """Their sum."""
        return sum(self._sizes.values())


class MemoryMeter:
    """Measures the first update of an engine by component, and stays out of the way afterwards.

    Args:
        model: in its working precision.
        optimizer: keeps the states.
        storages: where this rank's weights and gradients are.
        kept: tensors that store frozen weights beside the working ones.
        matrix_state: optimizer state that is not the optimizer's own, of matrix-wise updates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        storages: StepStorages,
        kept: Iterable[Mapping[str, torch.Tensor]],
        matrix_state: Iterable[torch.Tensor] = (),
    ) -> None:
        self._model, self._optimizer, self._storages = model, optimizer, storages
        self._kept = [tensor for tensors in kept for tensor in tensors.values()]
        self._matrix_state = list(matrix_state)
        self._gradients = self._activations = 0
        self.measured: MemoryUse | None = None
        """Once the first update is done; with `transient` on a CUDA device only."""

    def forward(self) -> AbstractContextManager[Any]:
        """Wraps a forward pass."""
        if self.measured is not None or self._activations:
            return nullcontext()
        known = Storages().add(self._weights()).add(self._model.buffers())
        saved = Storages()
        layers = [module for module in self._model.modules() if isinstance(module, Projection)]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            # by identity too: at stage 3 a parameter's gathered storage exists for a moment only
            own = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
            fresh = tensor.layout == torch.strided and not own
            fresh = fresh and tensor not in known and tensor not in saved
            # a layer may have begun to hold it in this very pass
            if fresh and not any(tensor is held for layer in layers for held in layer.held()):
                self._activations = saved.add([tensor]).bytes
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    def after_backward(self) -> None:
        """Look at the gradients: after a backward pass, and when an update begins."""
        if self.measured is None:
            found = Storages().add(self._storages.gradient_storages())
            self._gradients = max(self._gradients, found.bytes)

    def finish(self) -> None:
        """The first update is done: the optimizer has its states."""
        if self.measured is not None:
            return
        weights = Storages().add(self._weights()).add(self._kept)
        states = Storages().add(_tensors([dict(s) for s in self._optimizer.state.values()]))
        states.add(self._matrix_state)
        states.add(owner for owner in self._storages.owners() if owner not in weights)
        self.measured = MemoryUse(
            weights=weights.bytes,
            indices=Storages().add(self._model.buffers()).bytes,
            gradients=self._gradients,
            states=states.bytes,
            activations=self._activations,
        )
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            transient = torch.cuda.max_memory_allocated(device) - self.measured.total
            self.measured = replace(self.measured, transient=transient)

    def _weights(self) -> Iterator[torch.Tensor]:
        for parameter in self._model.parameters():
            yield from self._storages.weight_storages(parameter)


def _tensors(node: Any) -> Iterator[torch.Tensor]:
    """All tensors with elements in nested containers."""
    if isinstance(node, torch.Tensor):
        if node.numel():
            yield node
    elif isinstance(node, Mapping):
        for inner in node.values():
            yield from _tensors(inner)
    elif isinstance(node, list | tuple):
        for inner in node:
            yield from _tensors(inner)
