"""Which sample is used when: arithmetic on step numbers, with no state to save or to lose.

Sample k of a token file are its tokens [k*S, k*S + S] for sequences of length S: S + 1 tokens, so
that neighbours share one and every token but the first is a target once. Samples of all token files
are put in one global order n = 0, 1, 2, ...; step t takes n in [t*G, (t + 1)*G) for a global batch
of G.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relora_ds.errors import DataError
from relora_ds.randomness import Stream

MAX_PERIOD = 1 << 14
"""Longest period of a blend; also the finest share that a dataset can have."""


def num_samples(num_tokens: int, seq_length: int) -> int:
    """Samples of `seq_length + 1` tokens, neighbours sharing one, in a stream of `num_tokens`."""
    return max(0, num_tokens - 1) // seq_length


def rank_positions(
    step: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> np.ndarray:
    """Global sample numbers of one data-parallel rank in one step.

    Micro-batch j of all ranks together are consecutive numbers, so the global batch and its order
    over (micro-batch, rank, row) do not depend on how it is cut.

    Args:
        step: optimizer step, from 0.
        global_batch_size: samples per step over all ranks; a multiple of the product of the next
            two.
        micro_batch_size: samples per rank and forward pass.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: number of data-parallel ranks.

    Returns:
        int64 of shape (accumulation steps, micro_batch_size).
    """
    first = step * global_batch_size
    batch = np.arange(first, first + global_batch_size, dtype=np.int64)
    return batch.reshape(-1, dp_size, micro_batch_size)[:, dp_rank]


class Blend:
    """Assignment of global sample numbers to datasets, in proportion to their weights.

    The assignment has a period of at most `MAX_PERIOD` slots, chosen so that whole slots meet the
    weights best: exactly, for weights such as 0.7 and 0.3, otherwise to about `1 / MAX_PERIOD`.
    Every prefix of the sequence gives each dataset its share of slots to within one sample, by the
    algorithm of Tijdeman, "The chairman assignment problem", 1980.

    Args:
        weights: positive, any scale.

    Raises:
        DataError: a weight is not a number, or a share is too small to be met.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if not np.all(np.isfinite(values)) or not np.all(values >= 0) or not np.any(values):
            raise DataError(f"blend weights {list(weights)} must all be positive numbers")
        self.shares = values / values.sum()
        """Normalised weights, float64 of shape (datasets,)."""
        self.slots_of = _slots_per_dataset(self.shares)
        """Slots of each dataset in one period, int64 of shape (datasets,)."""
        self.slots = _chairmen(self.slots_of)
        """Dataset of each slot, int64 of shape (period,)."""
        self._before = np.zeros_like(self.slots)
        for dataset, count in enumerate(self.slots_of):
            self._before[self.slots == dataset] = np.arange(count)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where global sample numbers fall.

        Args:
            numbers: int64 of any shape.

        Returns:
            The dataset of each number, and how often that dataset was used before it; int64, same
            shape.
        """
        period, slot = np.divmod(numbers, len(self.slots))
        dataset = self.slots[slot]
        return dataset, period * self.slots_of[dataset] + self._before[slot]

    def uses(self, count: int) -> np.ndarray:
        """Uses of each dataset among the first `count` numbers, int64 of shape (datasets,)."""
        period, slot = divmod(count, len(self.slots))
        return period * self.slots_of + np.bincount(self.slots[:slot], minlength=len(self.slots_of))


@dataclass(frozen=True)
class SampleOrder:
    """The global order of samples over epochs and datasets.

    Every epoch of a dataset is a fresh permutation of all its samples. Permutations are keyed by
    the dataset's place in the blend, not by its path, so that moving files does not change a run.
    """

    sizes: tuple[int, ...]
    """Samples of each dataset; at least 1."""
    weights: tuple[float, ...]
    """Weights of the datasets, any scale."""
    seed: int
    """Seed of the run."""

    @functools.cached_property
    def blend(self) -> Blend:
        """Assignment of sample numbers to datasets."""
        return Blend(self.weights)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and sample index of global sample numbers.

        Args:
            numbers: int64 of any shape.

        Returns:
            Dataset numbers and sample indices, int64 of the same shape.
        """
        datasets, uses = self.blend.locate(numbers)
        sizes = np.asarray(self.sizes, dtype=np.int64)[datasets]
        epochs, positions = np.divmod(uses, sizes)
        samples = np.empty_like(positions)
        for dataset, epoch in {*zip(datasets.flat, epochs.flat, strict=True)}:
            here = (datasets == dataset) & (epochs == epoch)
            stream = Stream(self.seed, "data_order", name=str(dataset), event=int(epoch))
            samples[here] = stream.permutation(self.sizes[dataset])(positions[here])
        return datasets, samples


def _slots_per_dataset(shares: np.ndarray) -> np.ndarray:
    """Whole slots for each share, at the shortest period among those that come closest."""
    if shares.min() * MAX_PERIOD < 1:
        raise DataError(
            f"a blend weight is {shares.min():.2g} of the sum, but must be at least "
            f"1/{MAX_PERIOD}; raise it or leave that file out"
        )
    periods = np.arange(len(shares), MAX_PERIOD + 1)[:, None]
    wanted = shares * periods
    counts = np.floor(wanted).astype(np.int64)
    # what rounding down left over goes to the largest remainders
    by_remainder = np.argsort(counts - wanted, axis=1, kind="stable")
    place = np.argsort(by_remainder, axis=1, kind="stable")
    counts += place < periods - counts.sum(axis=1, keepdims=True)
    error = np.abs(counts / periods - shares).max(axis=1)
    error[(counts == 0).any(axis=1)] = np.inf
    # differences below the weights' own rounding must not prefer a longer period
    return counts[int(np.argmax(error <= error.min() + 1e-12))]


def _chairmen(counts: np.ndarray) -> np.ndarray:
    """A sequence with counts[d] times dataset d, every prefix within 1 of its share.

    Of the datasets that may be served without running ahead, the one with the earliest deadline is.
    """
    num_datasets, period = len(counts), int(counts.sum())
    slots = np.zeros(period, dtype=np.int64)
    if num_datasets == 1:
        return slots
    slack = period / (2 * num_datasets - 2)
    lag = np.zeros(num_datasets, dtype=np.int64)  # (share * slots - uses) * period
    for slot in range(period):
        lag += counts
        deadline = np.where(lag >= slack, (period - slack - lag) / counts, np.inf)
        chosen = int(np.argmin(deadline))
        slots[slot] = chosen
        lag[chosen] -= period
    return slots
