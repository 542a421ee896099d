"""Interrupting a run under an engine and going on with it, without a checkpoint's other files."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relora_ds.checkpoint.method_state import unwrap
from relora_ds.checkpoint.restore import load_side_tensors, side_slices, side_tensors
from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.engine.assemble import AwaitedState
from relora_ds.parallel.topology import Topology
from tests.harness.build import Training, batches
from tests.harness.runs import SMALL_BUCKETS, SWITCH_RATES, SWITCH_SEED

_TAG = "tag"
_BREAK_AT, _LAST = 25, 37


@dataclass(frozen=True)
class Break:
    """A run at the moment of its interruption, as one rank sees it.

    Args:
        directory: where DeepSpeed saved its part.
        side: exact weights and clocks by name.
        method: the method's own state.
    """

    directory: Path
    side: dict[str, torch.Tensor]
    method: dict[str, Any]

    @property
    def files(self) -> Path:
        """Where the files are."""
        return self.directory / _TAG


@torch.no_grad()
def save(run: Training, directory: Path) -> Break:
    """Save a run that may go on. A collective call."""
    (directory / _TAG).mkdir(parents=True, exist_ok=True)
    for name, shard in run.engine.shards().items():
        torch.save(shard, directory / _TAG / name)
    distributed.barrier()
    live = side_tensors(run.engine) | side_slices(run.engine)
    side = {name: tensor.clone() for name, tensor in live.items()}
    method = deepcopy(distributed.broadcast_object(unwrap(run.session.state_dict())[0]))
    return Break(directory, side, method)


def load(run: Training, saved: Break) -> None:
    """Put a fresh run where another one was interrupted. A collective call."""
    run.engine.load(str(saved.directory), _TAG)
    load_side_tensors(run.engine, saved.side)
    run.session.load_state_dict(saved.method)
    distributed.barrier()


def interrupted(
    topology: Topology, config: RunConfig, stage: int, directory: Path
) -> dict[str, Any]:
    """A run of SwitchLoRA that is interrupted, beside one that goes on.

    Returns:
        How many frozen vectors were `pending` at the break, and whether the rest of the run has the
        `same_losses` and ends with the `same_weights`.
    """
    # no whole copies of parameters as small as these
    zero = {"stage": stage, **SMALL_BUCKETS}
    zero |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    tokens = batches(_LAST, SWITCH_SEED)
    run = Training(config, topology, zero)
    _train(run, tokens[:_BREAK_AT], 0)
    pending = sum(int((~clock.live(_BREAK_AT)).sum()) for clock in run.engine.clocks.values())
    saved = save(run, directory)
    expected, weights = _train(run, tokens[_BREAK_AT:], _BREAK_AT)
    run.destroy()
    run = Training(config, topology, zero, weights=AwaitedState())
    load(run, saved)
    found, again = _train(run, tokens[_BREAK_AT:], _BREAK_AT)
    run.destroy()
    return {
        "pending": pending,
        "same_losses": found == expected,
        "same_weights": all(torch.equal(a, b) for a, b in zip(weights, again, strict=True)),
    }


def _train(
    run: Training, tokens: Sequence[torch.Tensor], first: int
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of updates from number `first` on, and the working weights after the last one."""
    losses = [run.update(first + i, each, SWITCH_RATES).loss for i, each in enumerate(tokens)]
    return losses, [weight.clone() for weight in run.gather(list(run.named.values()))]
