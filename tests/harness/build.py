"""Tiny runs, built as the product builds them and driven one step at a time.

All that tests of several ranks use of methods and engines goes through here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.assemble import DenseWeights, build_engine
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.device import device_memory
from relora_ds.engine.handover import exact_parameters
from relora_ds.errors import DesyncError
from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.interface import Event, projection_layers
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.topology import Topology
from relora_ds.planning.memory_report import closed_form, storage_plan

STAGES = (0, 1, 2, 3)
BATCH, MICRO, SEQUENCE, VOCAB = 8, 2, 12, 61

TINY = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    initializer_range=0.1,
)
"""Two layers, grouped heads, weights large enough to matter."""

UNEVEN = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=22,
    intermediate_size=27,
    num_hidden_layers=1,
    num_attention_heads=11,
    num_key_value_heads=11,
    head_dim=2,
    max_position_embeddings=16,
)
"""No group of its parameters has a multiple of 4 elements: padding must show."""

CUT = TINY.model_copy(update={"intermediate_size": 41, "attention_bias": True})
"""Neither its vocabulary nor the width of its MLP divides by two."""


def run_config(
    method: Mapping[str, object],
    *,
    train: Mapping[str, object] | None = None,
    optimizer: Mapping[str, object] | None = None,
    schedule: Mapping[str, object] | None = None,
    parallel: Mapping[str, object] | None = None,
) -> RunConfig:
    """A run of this method; each section holds what differs from the defaults.

    By default 14 steps in fp32 on global batches of 8 sequences of 12 tokens, 2 at a time.
    """
    shape = {"seq_length": SEQUENCE, "micro_batch_size": MICRO, "global_batch_size": BATCH}
    description = {
        "output_dir": "unused",
        "model": "unused",
        "deepspeed": "unused",
        "method": dict(method),
        "train": {"steps": 14, "precision": "fp32"} | shape | dict(train or {}),
        "optimizer": dict(optimizer or {}),
        "schedule": dict(schedule or {}),
        "parallel": dict(parallel or {}),
    }
    return RunConfig.model_validate_json(json.dumps(description))


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    """The run with other values of some keys of a section."""
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def batches(count: int, seed: int = 7, size: int = BATCH) -> list[torch.Tensor]:
    """Global batches of random tokens (size, SEQUENCE + 1)."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (size, SEQUENCE + 1), generator=draw) for _ in range(count)]


@dataclass(frozen=True)
class Update:
    """What one update found.

    Args:
        loss: mean over the global batch.
        norm: of the gradient over all ranks, before clipping.
        event: what the method did after the update.
    """

    loss: float
    norm: float
    event: Event | None


class Training:
    """The last phase of a run under its engine, driven step by step. Built on every rank.

    Args:
        config: the run.
        topology: this rank's place.
        zero: DeepSpeed's section of that name, with its `stage`.
        architecture: the model.
        deepspeed: further keys of the DeepSpeed dictionary.
        phase: number of the phase; the last one by default.
        weights: what the model starts from, if not from the seed's draw.
        probe: tokens (B, S) on which methods measure what they change.
        prepare: called with the filled model before DeepSpeed has it.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        zero: Mapping[str, object],
        architecture: ModelConfig = TINY,
        *,
        deepspeed: Mapping[str, object] | None = None,
        phase: int = -1,
        weights: DenseWeights = None,
        probe: torch.Tensor | None = None,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.config, self.topology, self.architecture = config, topology, architecture
        self.phase = plan_phases(config)[phase]
        self.method = self.phase.method
        source = {"zero_optimization": dict(zero), **(deepspeed or {})}
        self.zero = resolve_deepspeed_config(source, config, topology.dp_size)
        self.engine = build_engine(
            architecture, self.method, config, self.zero, topology, weights, probe, prepare
        )
        with torch.no_grad():
            self.session = self.method.start(self.engine.state, self.engine.model)

    def update(self, step: int, tokens: torch.Tensor, rates: Mapping[str, float]) -> Update:
        """The update after `step` completed ones, from a global batch (G, S + 1).

        Args:
            step: completed updates.
            tokens: of all ranks.
            rates: learning rate by role, before the method's own factor.
        """
        self.set_rates(step, rates)
        self.engine.state.gradients.batch = lambda: self.own_share(tokens)
        self.before_step(step)
        loss, norm = self.train_step(self.own_share(tokens))
        event = self.after_step(step + 1)
        return Update(float(distributed.mean_over_ranks(loss)), float(norm), event)

    def own_share(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """This rank's micro-batches of a global batch (G, S + 1)."""
        micro, topology = self.config.train.micro_batch_size, self.topology
        starts = range(topology.dp_rank * micro, len(tokens), micro * topology.dp_size)
        return [tokens[at : at + micro] for at in starts]

    def set_rates(self, step: int, rates: Mapping[str, float]) -> dict[str, float]:
        """Set the learning rates of the next update; returns them."""
        factor = self.method.lr_multiplier(step, self.phase.schedule)
        found = {role: factor * rate for role, rate in rates.items()}
        self.engine.set_learning_rates(found)
        return found

    @torch.no_grad()
    def before_step(self, step: int) -> Event | None:
        """The method's hook after `step` completed updates."""
        return self.session.before_step(step)

    def train_step(
        self, micro_batches: Iterable[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's mean loss and the global gradient norm of one update."""
        return self.engine.train_step(micro_batches)

    @torch.no_grad()
    def after_step(self, done: int) -> Event | None:
        """The method's hook after update number `done`."""
        return self.session.after_step(done)

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        """What the method reports for a line of the log."""
        return self.session.report().metrics

    @property
    def layers(self) -> list[AdapterLinear]:
        """The adapters in place of projections, in model order."""
        layers = projection_layers(self.engine.model).values()
        return [layer for layer in layers if isinstance(layer, AdapterLinear)]

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter of the model by name."""
        return dict(self.engine.model.named_parameters())

    def gather(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Working weights in fp32, of what tensor parallelism cuts this rank's part. A collective
        call at stage 3."""
        return [weight.float() for weight in self.engine.layout.gather(list(parameters))]

    def difference(self, expected: Mapping[str, torch.Tensor]) -> float:
        """Largest difference of a working weight from what is expected of it."""
        named = self.named
        pairs = zip(named, self.gather(list(named.values())), strict=True)
        return max(float((weight - expected[name]).abs().max()) for name, weight in pairs)

    def exact(self) -> dict[str, torch.Tensor]:
        """Every parameter by name at the precision it is kept, fp32, below stage 3."""
        return exact_parameters(self.engine)

    def replicas_differ(self) -> float:
        """Largest difference of any working weight between ranks. A collective call."""
        return spread(self.gather(list(self.named.values())))

    @property
    def measured_memory(self) -> dict[str, int]:
        """Bytes of the first update as the engine measured them, by component."""
        assert self.engine.memory.measured is not None
        return self.engine.memory.measured.as_dict()

    def expected_memory(self) -> dict[str, int]:
        """Bytes of an update by the closed form, by component."""
        dp_size, device = self.topology.dp_size, self.topology.device
        plan = storage_plan(self.config, self.zero.stage, dp_size, device, device_memory(device))
        return closed_form(self.config, self.architecture, self.method, plan).as_dict()

    def check_replicas(self, event: str | None = None) -> None:
        """Have the product compare the ranks.

        Raises:
            DesyncError: they differ.
        """
        self.engine.check_replicas(self.session.replicas(), event)

    def desync(self, event: str | None = None) -> str:
        """What the product says of a difference between ranks; empty if it finds none."""
        try:
            self.check_replicas(event)
        except DesyncError as error:
            return str(error)
        return ""

    def destroy(self) -> None:
        """Free the engine, so that another one can be built."""
        self.engine.destroy()


def spread(tensors: Iterable[torch.Tensor]) -> float:
    """Largest difference of any element between ranks. A collective call."""
    low = torch.cat([tensor.flatten() for tensor in tensors])
    high = low.clone()
    torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
    return float((high - low).max())


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor's memory as int16, to change single bits."""
    return cast(torch.Tensor, tensor.view(-1).view(torch.int16))
