"""Whether an update is applied, and what happens to the run if it is not.

The decision falls between the backward pass and the update, from figures that every rank has: all
ranks apply it or none does. What the guards remember is part of a checkpoint, so that a resumed run
decides as one that was never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from relora_ds.checkpoint.format.record import GuardState
from relora_ds.config.sections import GuardsConfig
from relora_ds.engine.engine import Admit
from relora_ds.errors import DivergenceError
from relora_ds.train.guards.spikes import SpikeDetector

_logger = logging.getLogger(__name__)

Note = Callable[[int, str, str], None]
"""Writes down a step (from 0) whose batch is not believed, what follows, and why."""


@dataclass(frozen=True)
class Rewind:
    """The run is to go back to a checkpoint and leave batches out."""

    steps: tuple[int, ...]
    """Steps, from 0, whose batches are left out; the checkpoint is from before the first."""
    reason: str
    """Why, in words."""


class StepGuard:
    """The guards of one run. All ranks hold the same, and come to the same decisions.

    Args:
        config: what leads to what.
        state: as a checkpoint holds it, or of a new run.
        note: called on every rank for every batch that is not believed.
    """

    def __init__(self, config: GuardsConfig, state: GuardState, note: Note) -> None:
        self._config = config
        self.note = note
        """Writes down a batch that is not believed."""
        self._spikes = SpikeDetector(config.loss_spike, state.losses, state.norms)
        self._skipped, self._rollbacks, self._events = (
            state.skipped_steps,
            state.rollbacks,
            state.events,
        )
        self._left_out = set(state.left_out)
        self.found: str | None = None
        """Why the run must go back, once that is decided."""
        self.skipped = False
        """Whether the last update was not applied."""

    def leaves_out(self, step: int) -> bool:
        """Whether a step, from 0, is not trained on."""
        self.skipped = step in self._left_out
        self._skipped += self.skipped
        return self.skipped

    def admit(self, step: int) -> Admit | None:
        """What is to be asked before the update of a step; None where nothing is."""
        if not self._config.decides_before_update:
            return None
        return lambda figures: self._decide(step, *_over_ranks(figures))

    def _decide(self, step: int, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            action = self._config.non_finite
            reason = f"the training loss is {loss} and the gradient norm {norm}"
        else:
            action = self._config.loss_spike.action
            reason = None if action == "off" else self._spikes.find(loss, norm)
        if reason is not None:
            reason = f"step {step + 1}: {reason}"
            self.note(step, action, reason)
            if action in ("skip", "rollback"):
                self._count(reason)
            _logger.warning("%s: %s", reason, action)
        if reason is None or action == "warn":
            self._spikes.take(loss, norm)
            return True
        if action == "skip":
            self.skipped = True
            self._skipped += 1
        elif action == "rollback":
            self.found = reason
        else:
            raise DivergenceError(
                f"{reason}: lower the learning rates or lengthen the warm-up, or let the run go on "
                "with guards.non_finite or guards.loss_spike.action: skip or rollback; nothing "
                "of the step was applied or saved"
            )
        return False

    def _count(self, reason: str) -> None:
        """Take up one more event.

        Raises:
            DivergenceError: it is one too many.
        """
        self._events += 1
        if self._events > self._config.max_events:
            raise DivergenceError(
                f"{reason}, after {self._config.max_events} batches and rollbacks that were "
                "tolerated (guards.max_events): the run does not recover; lower the learning rates "
                "or look at logs/bad_batches.jsonl"
            )

    def rewind(self, step: int, broken: str | None) -> Rewind | None:
        """What the decision about a step leads to, beyond the update not being applied.

        Args:
            step: the one that was decided on, from 0.
            broken: what of the weights is not finite.
        """
        if self.found is None:
            return None
        if broken is not None:
            return self.go_back(step, f"{self.found}; not finite: {broken}")
        blamed = [step]
        if step - 1 in self._left_out:  # again, right behind what was left out: not the batch alone
            blamed += self._last_trained(step)
        return Rewind(tuple(sorted(blamed)), self.found)

    def rescue(self, done: int, reason: str) -> Rewind:
        """What is left to do when the weights after `done` updates are not to be believed.

        Raises:
            DivergenceError: the run is to stop at that, or has done it too often.
        """
        if self._config.non_finite != "rollback":
            raise DivergenceError(reason)
        self._count(reason)
        return self.go_back(done, reason)

    def go_back(self, step: int, reason: str) -> Rewind:
        """Blame the last update that was applied before a step, from 0.

        Raises:
            DivergenceError: there was none.
        """
        blamed = self._last_trained(step)
        if not blamed:
            raise DivergenceError(f"{reason}: and no update was applied before")
        self.note(blamed[0], "rollback", reason)
        return Rewind(tuple(blamed), reason)

    def _last_trained(self, step: int) -> list[int]:
        earlier = (at for at in range(step - 1, -1, -1) if at not in self._left_out)
        return [at for at in [next(earlier, -1)] if at >= 0]

    def rewound(self, rewind: Rewind, saved: GuardState) -> StepGuard:
        """The guards of the run after it went back.

        Args:
            rewind: why, and what is to be left out.
            saved: what the checkpoint holds.
        """
        left_out = self._left_out.union(rewind.steps, saved.left_out)
        changes = {
            "rollbacks": self._rollbacks + 1,
            "events": self._events,
            "left_out": sorted(left_out),
        }
        return StepGuard(self._config, saved.model_copy(update=changes), self.note)

    def metrics(self) -> dict[str, int]:
        """Counts so far, where there can be any."""
        if not self._config.decides_before_update and not self._events:
            return {}
        return {"guards/skipped_steps": self._skipped, "guards/rollbacks": self._rollbacks}

    def state(self) -> GuardState:
        """What a checkpoint keeps of them."""
        return GuardState(
            skipped_steps=self._skipped,
            rollbacks=self._rollbacks,
            events=self._events,
            left_out=sorted(self._left_out),
            losses=list(self._spikes.losses),
            norms=list(self._spikes.norms),
        )


def _over_ranks(figures: torch.Tensor) -> tuple[float, float]:
    """Mean loss and gradient norm over all ranks, the same on each; waits for the device.

    Args:
        figures: see `Admit`.
    """
    everyone = figures.new_empty(torch.distributed.get_world_size() * figures.numel())
    torch.distributed.all_gather_into_tensor(everyone, figures)
    losses, squares, own = zip(*everyone.view(-1, figures.numel()).tolist(), strict=True)
    # sums of the same numbers in the same order, so that no rank decides otherwise
    if not all(math.isfinite(value) for value in (*losses, *squares, *own)):
        finite = all(math.isfinite(value) for value in (*squares, *own))
        loss = sum(losses) / len(losses)
        return loss, math.sqrt(math.fsum(squares)) if finite else math.nan
    return math.fsum(losses) / len(losses), math.sqrt(math.fsum(squares))
