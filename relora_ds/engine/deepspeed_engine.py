"""One model under DeepSpeed: updates, gradient norm, learning rates, and the state methods see."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from relora_ds.config.schema import RunConfig
from relora_ds.engine.base_weight import KINDS, BaseWeight, Precision
from relora_ds.engine.communication import recorder
from relora_ds.engine.deepspeed_config import reduces_once
from relora_ds.engine.digest import ReplicaDigest
from relora_ds.engine.fragments import clocked_fragments, rounding_streams
from relora_ds.engine.layout import Layout, build_layout
from relora_ds.engine.memory import MemoryMeter
from relora_ds.engine.optimizer import build_optimizer
from relora_ds.engine.partition import DenseSlices, release_stage3
from relora_ds.engine.saved_state import MOMENTS, SavedState
from relora_ds.engine.start import start_engine
from relora_ds.engine.state import Probe, ZeroState
from relora_ds.engine.tensor_gradients import TensorGradients, global_norm
from relora_ds.engine.vector_adamw import VectorAdamW
from relora_ds.engine.vector_clock import VectorClock
from relora_ds.errors import CheckpointError
from relora_ds.methods.interface import Method
from relora_ds.parallel.shape import seen_shape, shard_of
from relora_ds.parallel.tensor import SINGLE, TensorParallel


class TrainEngine:
    """A model, its optimizer and its partitioned state for one phase of a run.

    Args:
        model: built by the method, in fp32, already holding its initial values.
        method: says what is trained, edited and clocked.
        config: the run.
        deepspeed_config: resolved DeepSpeed dictionary.
        probe: output of the working model on a fixed batch; methods report drift with it.
        exact: fp32 slices of parameters that a `Cutter` rounded; emptied.
        tensor: the group that shares this copy of the model; the model is already cut over it.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method[Any],
        config: RunConfig,
        deepspeed_config: dict[str, Any],
        probe: Probe,
        exact: dict[nn.Parameter, torch.Tensor] | None = None,
        tensor: TensorParallel = SINGLE,
    ) -> None:
        self._tensor = tensor
        groups = method.parameter_groups(model)
        self.groups = [(group.role, list(group.parameters)) for group in groups]
        self.optimizer = build_optimizer(config.optimizer, groups)
        edited = method.edited_weights(model)
        if exact is None:  # taken before DeepSpeed casts the model
            exact = {w: w.detach().clone().view(-1) for w in edited}
        self._engine: Any = start_engine(model, self.optimizer, config, deepspeed_config, tensor)
        # bf16 stage 0 took an update on zero gradients; it must not count as a step
        self.optimizer.state.clear()
        self.model: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        wrapper, replicas = self._engine.optimizer, self._engine.data_parallel_group
        grouped = [parameters for _, parameters in self.groups]
        self.layout: Layout = build_layout(wrapper, self.optimizer, grouped, replicas)
        self.bases = self._store(edited, KINDS[base_precision(config)], exact)
        self._restore_slices(exact)
        axes = method.vector_axes(model).items()
        self.clocks = {p: VectorClock(seen_shape(p)[axis], axis) for p, axis in axes}
        if isinstance(self.optimizer, VectorAdamW):
            self.optimizer.fragments = clocked_fragments(self.layout, self.clocks)
            self.optimizer.roundings = rounding_streams(self.layout, self._names(), method.seed)
        self._digest = ReplicaDigest(
            dict(self.model.named_parameters()),
            self.layout,
            self.bases,
            self.clocks,
            replicas,
            tensor,
        )
        self.state = ZeroState(
            self.layout,
            self.bases,
            self.clocks,
            self.completed_steps,
            probe,
            lambda weight: self._digest.seal([weight]),
            tensor,
        )
        self._shares = TensorGradients(model, self.layout, wrapper, tensor)
        kept = [base.tensors() for base in self.bases.values()]
        self.memory = MemoryMeter(self.model, self.optimizer, wrapper, kept)
        if config.train.per_layer_update:
            self._engine.before_update = self.memory.after_backward
        # DeepSpeed reports none at stage 0 in fp32
        own_optimizer = wrapper is self.optimizer
        self._reduces_once = reduces_once(config, deepspeed_config)
        self._computes_norm = own_optimizer and not config.train.per_layer_update

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
            bases[weight] = kind(working, exact.pop(weight, working.float()))
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

    def train_step(
        self, micro_batches: Iterable[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One update from this rank's micro-batches of tokens (B, S + 1).

        Returns:
            The mean loss over this rank's micro-batches, not yet averaged over ranks, and the
            global gradient norm before clipping. Both fp32 scalars on the device: reading them
            waits for it.
        """
        self._engine.train()
        losses, norm = [], None
        with self._one_reduction() if self._reduces_once else nullcontext():
            for tokens in micro_batches:
                with recorder.phase("forward"), self.memory.forward():
                    loss = self._engine(tokens.to(self.device, non_blocking=True))
                with recorder.phase("backward"):
                    self._engine.backward(loss)
                losses.append(loss.detach().float())
                self.memory.after_backward()
                if not self._reduces_once:
                    norm = self._update(self._engine.is_gradient_accumulation_boundary())
        if self._reduces_once:
            norm = self._update(at_boundary=True)
        self.memory.finish()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return torch.stack(losses).mean(), torch.as_tensor(norm, dtype=torch.float32)

    def _update(self, at_boundary: bool) -> torch.Tensor | None:
        """DeepSpeed's step, which updates at an accumulation boundary only.

        Returns:
            The gradient norm, where DeepSpeed is not going to know it.
        """
        norm = None
        with recorder.phase("step"):
            if at_boundary:
                self._shares.complete()
                if self._computes_norm:
                    norm = self._gradient_norm()
            self._engine.step()
        return norm

    @contextmanager
    def _one_reduction(self) -> Iterator[None]:
        """Gradients of the backward passes inside are summed over processes on the way out.

        Anything that lets processes drift apart for several updates, such as averaging adapters
        every N steps, belongs here too.
        """
        with recorder.phase("backward"), self._engine.coalesce_grad_reduction():
            yield

    @torch.no_grad()
    def exact_parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter at the precision it is kept, fp32 on the CPU, the same on every
        data-parallel rank; of what tensor parallelism cuts, this rank's part.

        Masters are put together from the ranks' slices, one parameter at a time: a transition
        between phases may gather, a merge never does.
        """
        values = {}
        for name, parameter in self.model.named_parameters():
            if parameter in self.layout.placements:
                exact = self.layout.full_master(parameter)
            elif parameter in self.bases:
                exact = self.bases[parameter].load(parameter.data.view(-1), 0)
            else:
                exact = parameter.detach().float()
            values[name] = exact.view(parameter.shape).cpu()
        return values

    @torch.no_grad()
    def restore_masters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give masters the bits that the cast to the working precision took, where `values` has
        them: a master starts as a copy of the working weight.

        Args:
            values: uncut.
        """
        for name, parameter in self.model.named_parameters():
            if name in values and parameter in self.layout.placements:
                shard, value = shard_of(parameter), values[name].to(self.device)
                seen = value if shard is None or shard.inner else shard.part(value)
                self.state.write(parameter, seen)

    def _restore_slices(self, exact: dict[nn.Parameter, torch.Tensor]) -> None:
        """The same from this rank's slices, where `exact` has trained parameters."""
        for parameter in list(exact):
            value = exact.pop(parameter)
            if parameter in self.layout.placements:
                self.layout.placements[parameter].master().copy_(value)

    @torch.no_grad()
    def exact_slices(self) -> DenseSlices | None:
        """This rank's slices of every parameter at the precision it is kept; None where a rank
        holds all of the working weights. No communication."""
        if not self.layout.weights_cut:
            return None
        values = {}
        for name, parameter in self.model.named_parameters():
            _, working = self.layout.working(parameter)
            if parameter in self.layout.placements:
                working = self.layout.placements[parameter].master()
            elif parameter in self.bases:
                working = self.bases[parameter].load(working, 0)
            # a copy: a view would keep the whole flat tensor alive
            values[name] = working.to("cpu", torch.float32, copy=True)
        return DenseSlices(values)

    def destroy(self) -> None:
        """Free the engine so that another phase can build its own."""
        self._engine.destroy()
        if self.layout.weights_cut:
            release_stage3()
        del self._engine, self.model, self.layout, self.state, self.optimizer, self.groups
        del self._digest, self.memory, self._shares
        self.bases, self.clocks = {}, {}
        gc.collect()

    def save(self, directory: str, tag: str) -> None:
        """DeepSpeed's own shards of model and optimizer, frozen weights always included."""
        self._engine.save_checkpoint(directory, tag=tag, save_latest=False)

    def load(self, directory: str, tag: str) -> None:
        """Restore what `save` wrote, into the same layout."""
        path, _ = self._engine.load_checkpoint(directory, tag=tag, load_lr_scheduler_states=False)
        assert path is not None, "the caller verified that the files are there"
        for parameter in self.model.parameters():
            self.layout.drop_copies(parameter)

    @torch.no_grad()
    def load_state(self, saved: SavedState) -> None:
        """Restore a state that may have been saved with another number of processes or stage.

        Every rank reads its own slices.

        Raises:
            CheckpointError: the optimizer keeps its moments in another form, or the clocks are of
                another method.
        """
        if type(self.optimizer) not in (VectorAdamW, torch.optim.AdamW):
            raise CheckpointError(
                "a checkpoint of other processes or another ZeRO stage can be continued with "
                "optimizer.name adamw or torch_adamw only: the others keep moments in blocks or "
                "kernels of their own; resume with the processes and stage it was saved with"
            )
        for owner in self.layout.owners() if saved.completed else ():
            self.optimizer.state[owner] = {
                "step": torch.tensor(float(saved.completed)),
                **{key: torch.zeros_like(owner, dtype=torch.float32) for key in MOMENTS},
            }
        for name, parameter in self.model.named_parameters():
            start, working = self.layout.working(parameter)
            if parameter in self.layout.placements:
                self._load_trained(saved, name, parameter)
                working.copy_(saved.read("master", name, start, working.numel()))
            else:
                exact = saved.frozen(name, start, working.numel()).to(working.device)
                if parameter in self.bases:
                    self.bases[parameter].store(working, 0, exact)
                else:
                    working.copy_(exact)
            self.layout.drop_copies(parameter)
        self.load_side_tensors(saved.clocks | self._base_tensors())

    def _load_trained(self, saved: SavedState, name: str, parameter: nn.Parameter) -> None:
        placement = self.layout.placements[parameter]
        start, length = placement.stretch.start, placement.stretch.length
        placement.master().copy_(saved.read("master", name, start, length))
        for key in MOMENTS if saved.completed and length else ():
            own = self.layout.optimizer_state(parameter, key)
            assert own is not None
            own.copy_(saved.read(key, name, start, length))

    def side_tensors(self) -> dict[str, torch.Tensor]:
        """State that DeepSpeed does not know, the same on every rank, as live tensors by name."""
        names = self._names()
        tensors = {}
        for parameter, clock in self.clocks.items():
            for key, tensor in clock.tensors().items():
                tensors[f"clock.{names[parameter]}.{key}"] = tensor
        return tensors if self.layout.weights_cut else tensors | self._base_tensors()

    def side_slices(self) -> dict[str, torch.Tensor]:
        """More of the same that differs by rank: what lies beside this rank's slices of weights."""
        return self._base_tensors() if self.layout.weights_cut else {}

    def _base_tensors(self) -> dict[str, torch.Tensor]:
        names = self._names()
        return {
            f"base.{names[weight]}.{key}": tensor
            for weight, base in self.bases.items()
            for key, tensor in base.tensors().items()
        }

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def load_side_tensors(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Restore `side_tensors` and `side_slices` in place.

        Raises:
            CheckpointError: the saved names are not the ones of this run.
        """
        live = self.side_tensors() | self.side_slices()
        if live.keys() != saved.keys():
            odd = sorted(live.keys() ^ saved.keys())
            raise CheckpointError(
                f"the checkpoint's method state differs from the run's, first at {odd[0]!r}: it "
                "was written with another method or precision; resume with the run file it names"
            )
        for name, tensor in live.items():
            tensor.copy_(saved[name])
        for clock in self.clocks.values():
            clock.refresh()
        self._digest.seal(self.model.parameters())

    def _gradient_norm(self) -> torch.Tensor:
        return global_norm([p for _, group in self.groups for p in group], self._tensor)


def base_precision(config: RunConfig) -> Precision:
    """How edited weights are stored, with `auto` resolved."""
    chosen = config.train.base_precision
    if config.train.precision == "fp32" or chosen == "bf16":
        return "working"
    return "bf16_residual" if chosen in ("auto", "bf16_residual") else "fp32"
