"""DeepSpeed's engine behind the interface that `TrainEngine` drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn
from torch.distributed import ProcessGroup

from relora_ds.engine.deepspeed.checkpoint_engine import TensorFiles
from relora_ds.engine.deepspeed.flat_gradients import use_flat_gradients
from relora_ds.engine.deepspeed.layouts import build_layout
from relora_ds.engine.deepspeed.partition import name_hpz_group, release_stage3
from relora_ds.engine.distributed import barrier, lost_peers
from relora_ds.engine.zero.layout import Layout
from relora_ds.parallel.shape import keeps_tp_local_shape, shard_of
from relora_ds.parallel.tensor import TensorParallel, model_parallel_unit
from relora_ds.parallel.zero import ZeroSettings

_SETTINGS = ("clip_grad", "loss_scaler", "dynamic_loss_scale")
"""What DeepSpeed would take from a checkpoint, although it is a setting of the run."""


class DeepSpeedBackend:
    """`engine.backend.Backend` by DeepSpeed, at any ZeRO stage.

    Args:
        model: filled; at stage 3 every parameter was cut by a `ZeroPartitioner`.
        optimizer: over the model's parameters; DeepSpeed drives it.
        zero: settings, with the dictionary that DeepSpeed gets.
        tp: the group that shares this copy of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        zero: ZeroSettings,
        tp: TensorParallel,
    ) -> None:
        # DeepSpeed cuts what is left whole, but nobody would know its shape
        assert zero.stage < 3 or all(keeps_tp_local_shape(p) for p in model.parameters())
        self._optimizer, self._stage = optimizer, zero.stage
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=zero.deepspeed,
            dist_init_required=False,
            mpu=model_parallel_unit(tp),
        )[0]
        self._files = self._engine.checkpoint_engine = TensorFiles()
        # it would copy scripts beside the checkpoint, which omit frozen weights at stage 1
        self._engine._copy_recovery_script = lambda save_path: None
        use_flat_gradients(self._engine.optimizer)
        # bf16 stage 0 took an update on zero gradients; it must not count as a step
        optimizer.state.clear()
        self._gather_when_all_have_read()
        name_hpz_group()
        if zero.reduces_once:
            # it steps once per update; the loss is still divided by the number of micro-batches
            self._engine.set_gradient_accumulation_boundary(True)
        self.module: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        self.data_parallel_group: ProcessGroup = self._engine.data_parallel_group
        self.reports_norm = self._engine.optimizer is not optimizer

    def _gather_when_all_have_read(self) -> None:
        """Stage 3 gathers what it keeps whole as soon as a rank has read its files: that must not
        wait in a collective of the device for ranks that still read."""
        wrapper = self._engine.optimizer
        gather = getattr(wrapper, "checkpoint_event_epilogue", None)
        if gather is not None:

            def meet_and_gather() -> None:
                barrier()
                gather()

            wrapper.checkpoint_event_epilogue = meet_and_gather

    def layout(self, groups: Sequence[Sequence[nn.Parameter]]) -> Layout:
        """The layout that DeepSpeed chose for the optimizer's groups.

        Raises:
            ConfigError: the options lead to a layout that is not supported.
            ReloraError: a master does not hold the value of its parameter.
        """
        wrapper = self._engine.optimizer
        return build_layout(wrapper, self._optimizer, groups, self.data_parallel_group)

    def watch_updates(self, look: Callable[[], None]) -> None:
        """Call `look` when an update begins, while its gradients are alive."""
        self._optimizer.register_step_pre_hook(lambda *_: look())

    def train(self) -> None:
        """Put the model into training mode."""
        self._engine.train()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's loss on a micro-batch."""
        return self._engine(tokens)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a micro-batch, reduced where the stage does so."""
        self._engine.backward(loss)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of an update."""
        return self._engine.is_gradient_accumulation_boundary()

    def coalesce_grad_reduction(self) -> AbstractContextManager[Any]:
        """Gradients of the backward passes inside are reduced on the way out."""
        return self._engine.coalesce_grad_reduction()

    def step(self) -> None:
        """Close a micro-batch; at the boundary, update."""
        if self._stage == 0:
            self._mark_shards()
        self._engine.step()

    def _mark_shards(self) -> None:
        """The wrapper of bf16 stage 0 asks the gradients, not the parameters, whether they are
        parts, and takes them for copies."""
        for parameter in self.module.parameters():
            if parameter.grad is not None and shard_of(parameter) is not None:
                parameter.grad.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]

    def get_global_grad_norm(self) -> torch.Tensor | float:
        """Norm of all gradients of the last update before clipping, where `reports_norm`."""
        return self._engine.get_global_grad_norm()

    def shards(self) -> dict[str, Any]:
        """What this rank writes of model and optimizer, by name of the file; live.

        The parts of DeepSpeed's `save_checkpoint` that fill the files: as a whole it waits four
        times for all ranks, on their devices, around directories that it does not make here.
        """
        engine, place = self._engine, ("unused", "unused")
        self._files.collected = {}
        if hasattr(engine.optimizer, "checkpoint_event_prologue"):
            engine.optimizer.checkpoint_event_prologue()
        engine._save_checkpoint(*place)
        if engine.save_zero_checkpoint:
            engine._save_zero_checkpoint(*place)
        self._finish_files()
        collected, self._files.collected = self._files.collected, {}
        return collected

    def load_checkpoint(self, directory: str, tag: str) -> None:
        """Restore what was written of `shards`, with the same stage and processes."""
        wrapper = self._engine.optimizer
        own = {name: getattr(wrapper, name) for name in _SETTINGS if hasattr(wrapper, name)}
        try:
            path, _ = self._engine.load_checkpoint(
                directory, tag=tag, load_lr_scheduler_states=False
            )
        except Exception as error:
            # ranks that could read meet at the end of the call: one that could not must come too,
            # or they wait for it while it waits to tell them
            if not (isinstance(error, RuntimeError) and lost_peers(error)):
                self._finish_files()
            raise
        assert path is not None, "the caller verified that the files are there"
        for name, value in own.items():
            setattr(wrapper, name, value)

    def _finish_files(self) -> None:
        """Gather what stage 3 keeps whole, after files were filled or read. A collective call."""
        if hasattr(self._engine.optimizer, "checkpoint_event_epilogue"):
            self._engine.optimizer.checkpoint_event_epilogue()

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the model and let go of it."""
        self._engine.destroy()
        groups.mpu = None  # or an engine with other groups would be given this one's
        if self._stage == 3:
            release_stage3()
        del self._engine, self._optimizer, self.module
