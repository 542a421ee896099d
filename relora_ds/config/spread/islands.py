"""The section `islands`: when parts of a job meet that a slow link connects."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from relora_ds.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class OuterConfig(Section):
    """What islands do with the mean of their changes, DELTA, at the end of a round."""

    lr: PositiveFloat = 1.0
    """Share of DELTA by which the common weights move. 1 without momentum is the plain average."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay rate mu of a momentum V = mu V + DELTA that moves the common weights in its place. 0.9
    with `lr` 0.7 and `nesterov` is usual from a hundred updates per round on."""
    nesterov: bool = False
    """Look ahead along the momentum: the weights move by DELTA + mu V."""


class TransportConfig(Section):
    """How changes of weights travel between islands."""

    bits: Literal[4, 8, 16, 32] = 32
    """Size of an element. 32 is exact, 16 is bf16, 8 and 4 are multiples of a scale per 256."""
    error_feedback: bool = True
    """Add what rounding to fewer bits left out to the change of the next round, at the price of 4
    bytes of host memory per trained weight and process."""
    fragments: PositiveInt = 1
    """Parts of what is trained that travel in turn, each once per round, at most `every`: a slow
    link carries less at a time, more evenly."""
    overlap: NonNegativeInt = 0
    """Updates for which training goes on while a fragment travels, fewer than `every`. Islands then
    wait for the link only if it takes longer than that."""


class IslandsConfig(Section):
    """When islands meet, and what they do then; `parallel.islands` is how many there are."""

    every: PositiveInt = 1
    """Optimizer steps per round, at the end of which the islands average what they train. 1 with
    the plain average in 32 bits shares gradients before each update: data parallelism."""
    from_step: NonNegativeInt = 0
    """Updates before the first round, a multiple of `every`. Islands share gradients in them, as if
    `every` were 1: weights that still move fast are not left to drift apart, at the price of as
    many exchanges."""
    ramp: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    """Shorter rounds early in the run: `[[300, 2], [500, 5]]` has rounds of two updates until 300
    are done, and of five until 500, both multiples of `every`. What islands lose by training apart
    grows with the learning rate: rounds that are short while it is high cost less than rounds of
    one length that exchange as much. Every multiple of `every` ends a round, also a shorter one."""
    inner_lr: PositiveFloat = 1.0
    """Factor of all learning rates in rounds. An island has but its share of the batch, so that the
    part of a normalised update that islands have in common is smaller: with G islands and small
    batches the root of G makes up for it."""
    outer: OuterConfig = OuterConfig()
    """The step that is taken from the islands' mean."""
    transport: TransportConfig = TransportConfig()
    """What the mean is made of."""

    def rate_factor(self, done: int) -> float:
        """Factor of all learning rates in the update after `done` ones of the run."""
        apart = not self.share_gradients and done >= self.from_step
        return self.inner_lr if apart else 1.0

    def every_at(self, done: int) -> int:
        """Optimizer steps of the round that the update after `done` ones of the run is in."""
        return next((every for until, every in self.ramp if done < until), self.every)

    def ends_at(self, done: int) -> bool:
        """Whether a round ends after so many updates of the run."""
        return done % self.every % self.every_at(done - 1) == 0

    def round_ending(self, done: int) -> int:
        """Updates of the round that ends after so many of the run; 0 where none ends.

        An update in which islands share gradients is a round of its own.
        """
        if self.share_gradients or done <= self.from_step:
            return 1
        if not self.ends_at(done):
            return 0
        return (done - 1) % self.every % self.every_at(done - 1) + 1

    def lengths(self) -> list[tuple[int, int]]:
        """Updates of the run before rounds of a length begin, and that length, in their order."""
        starts = [self.from_step, *(until for until, _ in self.ramp)]
        return list(zip(starts, [*(shorter for _, shorter in self.ramp), self.every], strict=True))

    def ramp_ends(self, first: int, last: int, every: int) -> float:
        """Rounds that the ramp adds to those of `every` updates, between two counts of updates."""
        added, start = 0.0, self.from_step
        for until, shorter in self.ramp:
            updates = max(0, min(until, last) - max(start, first))
            added += updates * (-(-every // shorter) - 1) / every
            start = until
        return added

    @property
    def share_gradients(self) -> bool:
        """Whether islands average gradients before every update, not weights after it."""
        return self.every == 1 and self.outer == OuterConfig() and self.transport.bits == 32

    @property
    def in_turn(self) -> bool:
        """Whether a round may end without all weights being common at once."""
        return self.transport.fragments > 1 or self.transport.overlap > 0

    def ends_together(self, done: int) -> bool:
        """Whether the round that ends after so many updates makes all weights common in any case,
        as every shorter round of the ramp does."""
        return not self.in_turn or self.every_at(done - 1) != self.every

    def leaving(self, done: int) -> list[int]:
        """Numbers of the fragments that leave after so many updates of the run.

        Fragment f of F does so f / F of a round after the round began, in every round behind the
        ramp.
        """
        if self.every_at(done) != self.every:
            return []
        count = self.transport.fragments
        offsets = [number * self.every // count for number in range(count)]
        return [n for n, offset in enumerate(offsets) if (done - offset) % self.every == 0]
