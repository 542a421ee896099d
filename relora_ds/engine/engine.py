"""One model under DeepSpeed: updates, gradient norm, learning rates, and the state methods see."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from relora_ds.accounting.memory.meter import MemoryMeter
from relora_ds.accounting.recorder import recorder
from relora_ds.activity import doing
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.engine.backend import Backend, start_backend
from relora_ds.engine.device import check_places, device_memory
from relora_ds.engine.finite import FiniteCheck, is_finite_everywhere
from relora_ds.engine.islands.gradients import IslandGradients
from relora_ds.engine.islands.rounds import start_rounds
from relora_ds.engine.optimizer import build_optimizer, unapplied
from relora_ds.engine.precision import base_precision
from relora_ds.engine.zero.digest import ReplicaDigest
from relora_ds.engine.zero.fragments import clocked_fragments, rounding_streams
from relora_ds.engine.zero.layout import Layout
from relora_ds.engine.zero.matrices import ZeroMatrices
from relora_ds.engine.zero.moments import OptimizerSlices
from relora_ds.engine.zero.state import Probe, ZeroState
from relora_ds.engine.zero.tensor_gradients import (
    FrozenGradients,
    TensorGradients,
    global_norm,
    square_sums_of_slices,
)
from relora_ds.methods.formulation.choice import update_of
from relora_ds.methods.interface import (
    Method,
    Product,
    matrix_rules,
    optimizer_groups,
    projection_layers,
)
from relora_ds.numerics.base_weight import KINDS, BaseWeight, store_whole
from relora_ds.numerics.transfers import upload
from relora_ds.optim.grouped import GroupedOptimizer
from relora_ds.optim.vector_adamw import VectorAdamW
from relora_ds.optim.vector_clock import VectorClock
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.parallel.islands import ALONE, Islands
from relora_ds.parallel.linear import weights_stay
from relora_ds.parallel.shape import method_shape
from relora_ds.parallel.tensor import SINGLE, TensorParallel
from relora_ds.parallel.zero import ZeroSettings

_logger = logging.getLogger(__name__)

Admit = Callable[[torch.Tensor], bool]
"""Asked on every rank between the last backward pass of an update and the update, which is applied
only if all answer yes; they must answer alike.

The argument is (3,) fp64 on the device: this rank's mean loss; its share of the squared norm of the
gradient, such that the shares of all ranks add up to it; and the squared norm of the slices that it
holds, shared with others or not."""


class TrainEngine:
    """A model, its optimizer and its partitioned state for one phase of a run.

    Args:
        model: built by the method, in fp32, already holding its initial values.
        method: says what is trained, edited and clocked.
        config: the run.
        zero: its ZeRO settings.
        probe: output of the working model on a fixed batch; methods report drift with it.
        exact: fp32 slices of parameters that a `ZeroPartitioner` rounded; emptied.
        tp: the group that shares this copy of the model; the model is already cut over it.
        islands: whom it meets, and as seldom as `config.islands` says.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method[Any],
        config: RunConfig,
        zero: ZeroSettings,
        probe: Probe,
        exact: dict[nn.Parameter, torch.Tensor] | None = None,
        tp: TensorParallel = SINGLE,
        islands: Islands = ALONE,
    ) -> None:
        self._tp = tp
        groups = optimizer_groups(method, config.optimizer, model)
        self.groups = [(group.role, list(group.parameters)) for group in groups]
        rules = matrix_rules(method, config.optimizer, model)
        self.optimizer = build_optimizer(config.optimizer, groups, rules)
        self._probe_output = probe
        edited = method.edited_weights(model)
        kind = KINDS[base_precision(config)]
        self.bases: dict[nn.Parameter, BaseWeight] = {}
        if exact is None:  # the weights are whole: their fp32 values need not outlive the cast
            self.bases = {w: store_whole(w, kind, zero.dtype) for w in edited}
        self._engine: Backend = start_backend(model, self.optimizer, config, zero, tp)
        self.model: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        self.layout: Layout = self._engine.layout([parameters for _, parameters in self.groups])
        check_places(config.optimizer.name, self.layout, edited)
        if exact is not None:
            self.bases = self._store(edited, kind, exact)
            self._restore_slices(exact)
        axes = method.vector_axes(model).items()
        self.clocks = {p: VectorClock(method_shape(p)[axis], axis) for p, axis in axes}
        self.matrices = ZeroMatrices(self.layout, rules, self.names(), tp)
        self._place_optimizer(method.seed)
        self._digest = self._digest_of_replicas(islands)
        self.state = ZeroState(
            OptimizerSlices(
                self.layout, self.clocks, self.completed_steps, self.matrices.moments()
            ),
            self.bases,
            self._probe,
            FrozenGradients(self.model, self.device, self._engine.data_parallel_group, tp, islands),
            lambda weight: self._digest.seal([weight]),
            tp,
            lambda owner: () if self.rounds is None else self.rounds.kept_of(owner),
        )
        self._shares = TensorGradients(model, self.layout, tp)
        self._across = IslandGradients(self.layout, islands, self.device)
        # what islands do together where they do not share gradients
        self.rounds = start_rounds(self.layout, self.state.weights, islands, config.islands, model)
        # before DeepSpeed's own hook, which gathers; methods edit between the passes
        self._before_forward = self.model.register_forward_pre_hook(
            lambda *_: self.layout.order_gathers(), prepend=True
        )
        self.memory = self._meter()
        self._engine.watch_updates(self.memory.after_backward)
        self._reduces_once = zero.reduces_once
        self._layers = list(projection_layers(model).values())
        self.update_size = self._update_size(config.train, zero)

    def _meter(self) -> MemoryMeter:
        kept = [base.tensors() for base in self.bases.values()]
        states = {**self.matrices.side_tensors(), **self.matrices.side_slices()}.values()
        return MemoryMeter(self.model, self.optimizer, self.layout, kept, states)

    def _place_optimizer(self, seed: int) -> None:
        """Tell the optimizer what lies where in its flat tensors."""
        if isinstance(self.optimizer, VectorAdamW):
            self.optimizer.fragments = clocked_fragments(self.layout, self.clocks)
            self.optimizer.roundings = rounding_streams(self.layout, self.names(), seed)
        if isinstance(self.optimizer, GroupedOptimizer):
            self.optimizer.matrices = self.matrices.placed
            self.optimizer.exchange = self.matrices
            self.optimizer.refresh = self.matrices.refresh

    def _update_size(self, train: TrainConfig, zero: ZeroSettings) -> UpdateSize:
        memory = device_memory(self.device)
        place = zero.stage, zero.dp_size, self.device.type, memory
        size = update_of(self._layers, train, *place)
        for how, count in Counter(layer.describe(size) for layer in self._layers).items():
            if how:
                _logger.info("%d projections, %d tokens each: %s", count, size.tokens, how)
        return size

    def _digest_of_replicas(self, islands: Islands) -> ReplicaDigest:
        parts = self.layout, self.bases, self.clocks, self.matrices
        group, names = self._engine.data_parallel_group, dict(self.model.named_parameters())

        def common() -> bool:
            return self.rounds is None or self.rounds.common

        return ReplicaDigest(names, *parts, group, self._tp, islands, common)

    def _probe(self) -> torch.Tensor | None:
        self.layout.order_gathers()  # a probe may enter the model below its forward pass
        return self._probe_output()

    def _store(
        self,
        edited: Iterable[nn.Parameter],
        kind: type[BaseWeight],
        exact: dict[nn.Parameter, torch.Tensor],
    ) -> dict[nn.Parameter, BaseWeight]:
        """The authoritative values of edited weights; takes them out of `exact`."""
        bases = {}
        for weight in edited:
            _, working = self.layout.working(weight)
            value = exact.pop(weight) if weight in exact else working.float()
            bases[weight] = kind(working, value)
        return bases

    def check_replicas(
        self, more: Mapping[str, torch.Tensor] | None = None, event: str | None = None
    ) -> None:
        """Make sure that all ranks still hold the same run. A collective call.

        Args:
            more: further tensors by name, which every rank must hold alike.
            event: what happened last to the weights, for the message.

        Raises:
            DesyncError: they do not; names the first tensor and the ranks.
        """
        self._digest.check(more or {}, event)

    def non_finite(self) -> str | None:
        """What of weights, masters and moments is not finite, with its ranks, or that the model's
        output is not; None if all is.

        A collective call that waits for the device. Finite weights can be so large that nothing
        that is computed with them is finite: the run cannot go on from these either.
        """
        names = dict(self.model.named_parameters())
        problem = FiniteCheck(names, self.layout, self.bases, self.matrices).problem()
        if problem is None:
            with torch.no_grad():
                output = self.state.probe()
            if output is not None and not is_finite_everywhere(output):
                problem = "the model's output on a fixed batch, though its weights are finite"
        return problem

    def completed_steps(self) -> int:
        """Updates that the optimizer itself has applied in this phase, skipped ones not counted."""
        for owner in self.layout.owners():
            step = self.optimizer.state.get(owner, {}).get("step")
            if step is not None:
                return int(step)
        return 0

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Learning rate by group role, for the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["role"]]

    def begin_update(self, done: int) -> None:
        """Say how many updates of the run are over; call before each. Islands may train apart from
        some on."""
        if self.rounds is not None:
            self.rounds.begin(done)

    def train_step(
        self, micro_batches: Iterable[torch.Tensor], admit: Admit | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One update from this rank's micro-batches of tokens (B, S + 1).

        Args:
            micro_batches: of this rank.
            admit: decides whether the update is applied; where it is not, weights, masters,
                moments and clocks stay as they are. By default it is.

        Returns:
            The mean loss over this rank's micro-batches, not yet averaged over ranks, and the
            global gradient norm before clipping. Both fp32 scalars on the device: reading them
            waits for it.
        """
        self._engine.train()
        # until the update is over: its backward passes may be where it happens
        with weights_stay(self._layers, self.update_size):
            losses, norm = self._passes(micro_batches, admit)
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return torch.stack(losses).mean(), torch.as_tensor(norm, dtype=torch.float32)

    def end_round(self, done: int, products: Sequence[Product], common: bool = True) -> None:
        """Let islands meet, if it is time. A collective call of all of them.

        Args:
            done: updates of the run.
            products: of factors that the method is about to merge.
            common: whether all weights have to be common at the end of a round.
        """
        if self.rounds is not None:
            self.rounds.end(done, products, common)

    def weights_kept(self, batches: int) -> AbstractContextManager[None]:
        """Within it the weights stay as they are for so many forward passes."""
        return weights_stay(self._layers, replace(self.update_size, micro_batches=max(1, batches)))

    def _passes(
        self, micro_batches: Iterable[torch.Tensor], admit: Admit | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Losses of all micro-batches, and the norm where DeepSpeed is not going to know it."""
        losses, norm = [], None
        with self._one_reduction() if self._reduces_once else nullcontext():
            for tokens in micro_batches:
                with doing("micro-batch"):
                    with recorder.phase("forward"), self.memory.forward():
                        loss = self._engine(upload(tokens, self.device))
                    with recorder.phase("backward"):
                        self._engine.backward(loss)
                losses.append(loss.detach().float())
                self.memory.after_backward()
                if not self._reduces_once:
                    at_boundary = self._engine.is_gradient_accumulation_boundary()
                    norm = self._update(losses, admit, at_boundary)
        if self._reduces_once:
            norm = self._update(losses, admit, at_boundary=True)
        return losses, norm

    def _update(
        self, losses: list[torch.Tensor], admit: Admit | None, at_boundary: bool
    ) -> torch.Tensor | None:
        """DeepSpeed's step, which updates at an accumulation boundary only.

        Returns:
            The gradient norm, where DeepSpeed is not going to know it.
        """
        with recorder.phase("step"), doing("optimizer"):
            if not at_boundary:
                self._engine.step()
                return None
            self._shares.complete()
            if self.rounds is None or self.rounds.common:
                self._across.average()
            norm = None if self._engine.reports_norm else self._gradient_norm()
            if admit is None or admit(self._figures(losses)):
                self._engine.step()
                self.memory.finish()
                return norm
            with unapplied(self.optimizer):
                self._engine.step()
            return torch.full((), torch.nan) if norm is None else norm

    def _figures(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """What `Admit` is asked with."""
        own = square_sums_of_slices(self.layout, self._tp, self.device)
        return torch.cat([torch.stack(losses).mean().double().view(1), own])

    @contextmanager
    def _one_reduction(self) -> Iterator[None]:
        """Gradients of the backward passes inside are summed over processes on the way out.

        Anything that lets processes drift apart for several updates, such as averaging adapters
        every N steps, belongs here too.
        """
        with recorder.phase("backward"), self._engine.coalesce_grad_reduction():
            yield

    def _restore_slices(self, exact: dict[nn.Parameter, torch.Tensor]) -> None:
        """Give masters the bits that the cast to the working precision took, where `exact` has
        this rank's slices of trained parameters."""
        for parameter in list(exact):
            value = exact.pop(parameter)
            if parameter in self.layout.placements:
                self.layout.placements[parameter].master().copy_(value)

    def destroy(self) -> None:
        """Free the engine so that another phase can build its own."""
        if self.rounds is not None:
            self.rounds.settle()
        self._engine.destroy()
        del self._engine, self.model, self.layout, self.state, self.optimizer, self.groups
        del self._digest, self.memory, self._shares, self.matrices, self._across, self.rounds
        del self._probe_output, self._layers
        self._before_forward.remove()
        self.bases, self.clocks = {}, {}
        gc.collect()

    def shards(self) -> dict[str, Any]:
        """What `load` reads, as this rank holds it: model and optimizer, frozen weights included.

        A collective call; nothing is written.

        Returns:
            By name of the file; the tensors are live.
        """
        return self._engine.shards()

    def load(self, directory: str, tag: str) -> None:
        """Restore what was written of `shards`, into the same layout.

        Settings of the optimizer stay this run's: the files hold those they were written with.
        """
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "step")}
            for group in self.optimizer.param_groups
        ]
        self._engine.load_checkpoint(directory, tag)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        for parameter in self.model.parameters():
            self.layout.drop_copies(parameter)

    def names(self) -> dict[nn.Parameter, str]:
        """Full name of every parameter of the model."""
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def seal_frozen(self) -> None:
        """Take all weights as they are now for what replica checks compare with."""
        self._digest.seal(self.model.parameters())

    def _gradient_norm(self) -> torch.Tensor:
        return global_norm([p for _, group in self.groups for p in group], self._tp)
