"""Small runs, built as the product builds them and driven one step at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Sizes
from relora_ds.checkpoint.method_state import unwrap
from relora_ds.checkpoint.restore import load_side_tensors, side_slices, side_tensors
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.assemble import AwaitedState, DenseWeights, build_engine
from relora_ds.engine.deepspeed.config import resolve_deepspeed_config
from relora_ds.engine.device import set_arithmetic
from relora_ds.methods.interface import Event
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.topology import Topology, share_models

TIMEOUT_MINUTES = 2.0
STEPS = 12
_TAG = "tag"
_RATES = {"dense": 1e-2, "adapter": 1e-2, "pair": 1e-2}

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    # a new subspace every four updates
    "galore": {"name": "galore", "rank": 4, "update_every": 4},
    "lora": {"name": "lora", "rank": 4, "alpha": 8},
    "low_rank": {"name": "low_rank", "rank": 4},
    "relora": {
        "name": "relora",
        "rank": 4,
        "alpha": 8,
        "merge_every": 4,
        "restart_warmup_steps": 1,
    },
    "sltrain": {"name": "sltrain", "rank": 4, "scale": 1.0, "sparsity": 0.1},
    # vectors are switched before two of three updates, and frozen for two
    "switchlora": {
        "name": "switchlora",
        "rank": 4,
        "interval": 4,
        "freeze_steps": 2,
        "descent_rate": 1.0,
    },
}
"""Methods of which everything that they ever do happens within twelve steps."""


def architecture(sizes: Sizes) -> ModelConfig:
    """A model with grouped heads whose MLP has an odd width."""
    return ModelConfig(
        vocab_size=sizes.pick(101, 1009),
        hidden_size=sizes.pick(32, 256),
        intermediate_size=sizes.pick(43, 683),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=sizes.pick(8, 64),
        max_position_embeddings=128,
        initializer_range=0.05,
    )


def run_config(method: Mapping[str, Any], **train: object) -> RunConfig:
    """A run of twelve steps on global batches of 4 sequences, 2 at a time; `train` replaces keys.

    A section that is no key of `train` replaces that section.
    """
    sections = {"optimizer", "parallel", "data", "checkpoint", "eval", "log"}
    other = {name: train.pop(name) for name in list(train) if name in sections}
    shape = {"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4}
    description = {
        "output_dir": "unused",
        "model": "unused",
        "deepspeed": "unused",
        "method": dict(method),
        # micro-batches so small are padded on request only
        "train": {"steps": STEPS, "precision": "fp32", "pad_mlp": "on"} | shape | train,
        **other,
    }
    return RunConfig.model_validate_json(json.dumps(description))


def batches(config: RunConfig, vocabulary: int, count: int) -> list[torch.Tensor]:
    """Global batches of random tokens (G, S + 1), the same on every device."""
    draw = torch.Generator().manual_seed(7)
    shape = (config.train.global_batch_size, config.train.seq_length + 1)
    return [torch.randint(0, vocabulary, shape, generator=draw) for _ in range(count)]


def join(config: RunConfig) -> Topology:
    """Join the group of this case's ranks; all compute on the first device."""
    return share_models(distributed.start(TIMEOUT_MINUTES), config)


def be_deterministic() -> None:
    """Choose kernels as a run with `train.deterministic` does."""
    set_arithmetic(run_config(METHODS["full"], deterministic=True).train)


@dataclass(frozen=True)
class Saved:
    """A run at a step, as one rank sees it."""

    directory: Path
    side: dict[str, torch.Tensor]
    method: dict[str, Any]


class SmallRun:
    """The last phase of a run under its engine.

    Args:
        config: the run.
        topology: this rank's place.
        zero: DeepSpeed's section of that name, with its `stage`.
        model: the architecture.
        weights: what it starts from, if not from the seed's draw.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        zero: Mapping[str, Any],
        model: ModelConfig,
        weights: DenseWeights = None,
    ) -> None:
        self.config, self.topology = config, topology
        self.phase = plan_phases(config)[-1]
        settings = resolve_deepspeed_config(
            {"zero_optimization": dict(zero)}, config, topology.dp_size
        )
        probe = batches(config, model.vocab_size, 1)[0][:1, :-1]
        self.engine = build_engine(
            model, self.phase.method, config, settings, topology, weights, probe
        )
        with torch.no_grad():
            self.session = self.phase.method.start(self.engine.state, self.engine.model)

    def update(self, step: int, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Event]]:
        """The update after `step` completed ones, from a global batch.

        Returns:
            This rank's mean loss, on the device, and what the method did around the update.
        """
        # a method may look at the gradient of the batch before it is taken
        self.engine.state.gradients.batch = lambda: self._own_share(tokens)
        events = [self.before_step(step)]
        loss = self.train_step(step, tokens)
        events.append(self.after_step(step + 1))
        return loss, [event for event in events if event is not None]

    @torch.no_grad()
    def before_step(self, step: int) -> Event | None:
        """The method's hook after `step` completed updates."""
        return self.session.before_step(step)

    def train_step(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """Forward, backward and update."""
        factor = self.phase.method.lr_multiplier(step, self.phase.schedule)
        self.engine.set_learning_rates({role: factor * rate for role, rate in _RATES.items()})
        loss, _ = self.engine.train_step(self._own_share(tokens))
        return loss

    def _own_share(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """This rank's micro-batches of a global batch."""
        micro, place = self.config.train.micro_batch_size, self.topology
        first, stride = place.dp_rank * micro, micro * place.dp_size
        return [tokens[at : at + micro] for at in range(first, len(tokens), stride)]

    @torch.no_grad()
    def after_step(self, done: int) -> Event | None:
        """The method's hook after update number `done`."""
        return self.session.after_step(done)

    def train(self, tokens: Sequence[torch.Tensor], first: int = 0) -> tuple[list[float], int]:
        """Losses over all ranks of updates from number `first` on, and how many events happened.

        Switches are one event, however many there are: a method reports them together.
        """
        pairs = [self.update(first + i, each) for i, each in enumerate(tokens)]
        losses = [float(distributed.mean_over_ranks(loss)) for loss, _ in pairs]
        reported = self.session.report().event is not None
        return losses, sum(len(events) for _, events in pairs) + reported

    def weights(self) -> list[torch.Tensor]:
        """Working weights, whole. A collective call at stage 3."""
        parameters = list(self.engine.model.parameters())
        return [weight.clone() for weight in self.engine.layout.gather(parameters)]

    @torch.no_grad()
    def save(self, directory: Path) -> Saved:
        """Save the state of a run that may go on. A collective call."""
        (directory / _TAG).mkdir(parents=True, exist_ok=True)
        for name, shard in self.engine.shards().items():
            torch.save(shard, directory / _TAG / name)
        distributed.barrier()
        live = side_tensors(self.engine) | side_slices(self.engine)
        side = {name: tensor.clone() for name, tensor in live.items()}
        state = deepcopy(distributed.broadcast_object(unwrap(self.session.state_dict())[0]))
        return Saved(directory, side, state)

    def load(self, saved: Saved) -> None:
        """Go on where another run was saved. A collective call."""
        self.engine.load(str(saved.directory), _TAG)
        load_side_tensors(self.engine, saved.side)
        self.session.load_state_dict(saved.method)
        distributed.barrier()

    def destroy(self) -> None:
        """Free the engine, so that another one can be built."""
        self.engine.destroy()


def resumed(
    config: RunConfig,
    topology: Topology,
    zero: Mapping[str, Any],
    model: ModelConfig,
    saved: Saved,
) -> SmallRun:
    """A fresh engine that goes on where another one was saved."""
    run = SmallRun(config, topology, zero, model, AwaitedState())
    run.load(saved)
    return run
