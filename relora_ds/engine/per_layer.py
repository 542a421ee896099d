"""Updates within the backward pass: each gradient is used and freed as soon as it is complete.

With one micro-batch per update no more than one layer's gradients are alive at a time: where both
factors of a projection are updated as one, the first waits for the second. With
accumulation the gradients of the earlier micro-batches have to be kept, and the updates happen in
the last backward pass: one update per global batch, never one per micro-batch. Every process holds
the whole optimizer state. DeepSpeed's engine reduces, clips and steps after the backward pass, so
it is not used here; where ZeRO cuts gradients there is no whole gradient to use.

In bf16 the optimizer steps fp32 masters, or the parameters themselves and rounds them at random.
Without masters nothing is as large as a gradient in fp32.

Clipping: the global norm is known only when the last update is over, so each parameter's gradient
is clipped to a norm of `clip` on its own. A run that never reaches the limit is the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.deepspeed.files import model_file, read_shard
from relora_ds.engine.zero.layout import Layout, MasterCopies, WholeParameters
from relora_ds.errors import CheckpointError
from relora_ds.optim.vector_adamw import STRETCH, VectorAdamW
from relora_ds.parallel.zero import ZeroSettings

_MODEL_FILE = model_file(tensor_rank=0)  # so that exports find it

_AVERAGED = 1 << 23
"""Elements that travel at once: 32 MiB in fp32, where a collective's latency is negligible."""


class PerLayerEngine:
    """`engine.backend.Backend` for per-layer updates at stage 0.

    Args:
        model: filled, in fp32; cast and moved.
        optimizer: over the model's parameters; it is given masters where the model is cast.
        zero: settings of stage 0, for accumulation, clipping and precision.
        device: where the process computes.
        masters: give the optimizer fp32 copies of parameters in bf16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        zero: ZeroSettings,
        device: torch.device,
        masters: bool = True,
    ) -> None:
        assert isinstance(optimizer, VectorAdamW), "the configuration was checked"
        world = torch.distributed.group.WORLD
        assert world is not None, "the process group is joined before"
        self.module = model.to(device)
        self.device = device
        self.data_parallel_group: ProcessGroup = world
        self.reports_norm = True
        self._before_update: Callable[[], None] = lambda: None
        self._optimizer = optimizer
        self._accumulation, self._clip = zero.accumulation, zero.clip
        self._micro_step = 0
        self._norm_sq: torch.Tensor | None = None
        groups = [list(group["params"]) for group in optimizer.param_groups]
        model.to(zero.dtype)
        self._has_masters = masters and zero.dtype != torch.float32
        self._working: dict[torch.Tensor, torch.Tensor] = {}
        """Parameters by their masters."""
        if self._has_masters:
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [nn.Parameter(p.detach().float()) for p in parameters]
                self._working |= dict(zip(group["params"], parameters, strict=True))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._updater(number, index))
            for number, parameters in enumerate(groups)
            for index, parameter in enumerate(parameters)
        ]

    def layout(self, groups: Sequence[Sequence[nn.Parameter]]) -> Layout:
        """The layout of what the optimizer steps: masters, or the parameters themselves."""
        kind = MasterCopies if self._has_masters else WholeParameters
        return kind(groups, self._optimizer, None)

    def watch_updates(self, look: Callable[[], None]) -> None:
        """Call `look` when an update begins, while the gradient that it uses is alive."""
        self._before_update = look

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's loss on a micro-batch."""
        return self.module(tokens)

    def train(self) -> None:
        """Put the model into training mode."""
        self.module.train()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of an update."""
        return self._micro_step == self._accumulation - 1

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a micro-batch, and at the boundary all updates."""
        if self.is_gradient_accumulation_boundary():
            self._norm_sq = None
        (loss / self._accumulation).backward()

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        """Nothing: an update reduces each gradient once in any case."""
        return nullcontext()

    def step(self) -> None:
        """Close a micro-batch; the updates are done already."""
        self._micro_step = (self._micro_step + 1) % self._accumulation

    def get_global_grad_norm(self) -> torch.Tensor:
        """Norm over all gradients of the last update, before any was clipped."""
        assert self._norm_sq is not None, "asked for before an update"
        return self._norm_sq.sqrt()

    def _updater(self, group: int, index: int) -> Callable[[torch.Tensor], None]:
        # the index and not the group: loading an optimizer's state replaces its groups
        @torch.no_grad()
        def update(parameter: torch.Tensor) -> None:
            if not self.is_gradient_accumulation_boundary():
                return
            self._before_update()
            assert parameter.grad is not None
            settings = self._optimizer.param_groups[group]
            owner = settings["params"][index]
            if owner is not parameter:
                owner.grad = parameter.grad.to(owner.dtype)
                self._before_update()
                parameter.grad = None
            _average(owner.grad)
            factor = self._clip_factor(owner.grad)
            stepped = self._optimizer.update_early(owner, settings, factor)
            for each in stepped:
                each.grad = None
                if each in self._working:
                    self._working[each].copy_(each)

        return update

    def _clip_factor(self, grad: torch.Tensor) -> torch.Tensor | None:
        """What a gradient is multiplied by, on the device; its norm is taken up."""
        norms = [torch.linalg.vector_norm(part.float()) for part in _stretches(grad)]
        square = torch.stack(norms).square().sum()
        self._norm_sq = square if self._norm_sq is None else self._norm_sq + square
        if self._clip == 0.0:
            return None
        # the factor that torch and DeepSpeed use
        return (self._clip / (square.sqrt() + 1e-6)).clamp(max=1.0)

    def shards(self) -> dict[str, Any]:
        """Model, masters and moments in one file of the first rank: all ranks have the same."""
        if torch.distributed.get_rank() != 0:
            return {}
        saved = {
            "module": self.module.state_dict(),
            "masters": self._masters(),
            "optimizer": self._optimizer.state_dict(),
        }
        return {_MODEL_FILE: saved}

    def load_checkpoint(self, directory: str, tag: str) -> None:
        """Restore what was written of `shards`.

        Raises:
            CheckpointError: it was not written with per-layer updates.
        """
        path = Path(directory) / tag / _MODEL_FILE
        saved = read_shard(path)
        if "masters" not in saved:
            raise CheckpointError(
                f"{path}: was written without train.per_layer_update; resume it as it was"
            )
        if bool(saved["masters"]) != bool(self._masters()):
            raise CheckpointError(
                f"{path}: was written with another train.master_weights; resume it as it was"
            )
        self.module.load_state_dict(saved["module"])
        with torch.no_grad():
            for master, value in zip(self._masters(), saved["masters"], strict=True):
                master.copy_(value)
        self._optimizer.load_state_dict(saved["optimizer"])

    def _masters(self) -> Sequence[torch.Tensor]:
        if not self._has_masters:
            return []
        return [p.detach() for group in self._optimizer.param_groups for p in group["params"]]

    def destroy(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        del self.module, self._optimizer


def _average(grad: torch.Tensor) -> None:
    """Over all processes, in fp32 also where the gradient is in bf16: it is rounded once."""
    size = torch.distributed.get_world_size()
    for part in _stretches(grad, _AVERAGED) if size > 1 else ():
        whole = part.float()
        torch.distributed.all_reduce(whole)
        whole.div_(size)
        if whole is not part:
            part.copy_(whole)


def _stretches(grad: torch.Tensor, length: int = STRETCH) -> Sequence[torch.Tensor]:
    """Views of a gradient, whole or of `length` where they have to be copied to fp32."""
    flat = grad.view(-1)
    return [flat] if flat.dtype == torch.float32 else flat.split(length)
