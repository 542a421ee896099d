"""Parked vectors: drawn on demand, kept bit for bit, shared by processes that do not wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from relora_ds.methods.switchlora.candidate_pool import CandidatePool
from relora_ds.numerics.batched.draws import UniformRows
from relora_ds.randomness import Stream

SLOTS, WIDTH = 20, 6
STREAM = Stream(3, "candidate_A", "q")
BOUND = 0.3


def pool(
    dtype: torch.dtype = torch.float32,
    span: tuple[int, int] = (0, WIDTH),
    places: list[torch.Tensor] | None = None,
    writes: bool = True,
) -> CandidatePool:
    """A pool; `places` are those of another process that shares them."""
    given = iter(places or [])

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return next(given, torch.zeros(*shape, dtype=dtype))

    draw = UniformRows(STREAM, WIDTH, *span, bound=BOUND)
    like = torch.empty(0, dtype=dtype)
    return CandidatePool(SLOTS, span, like, draw, allocate, writes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_candidate_never_used_is_the_seed_s_and_needs_no_memory(dtype: torch.dtype) -> None:
    fresh = pool(dtype)
    slots = np.array([7, 0, 19])
    drawn = STREAM.uniform(0, SLOTS * WIDTH).view(SLOTS, WIDTH)
    whole = ((2.0 * drawn - 1.0) * BOUND).to(dtype)
    assert torch.equal(fresh.take(slots), whole[slots])
    assert torch.equal(fresh.take(slots[::-1].copy()), whole[slots[::-1].copy()])
    assert fresh.allocated_bytes == fresh.stored == 0


def test_slices_of_candidates_are_slices_of_the_whole() -> None:
    slots = np.array([4, 11])
    parts = [pool(span=span).take(slots) for span in ((0, 2), (2, 5), (5, 6))]
    assert torch.equal(torch.cat(parts, dim=1), pool().take(slots))


def test_parked_vectors_come_back_bit_for_bit() -> None:
    kept = pool(torch.bfloat16)
    expected: dict[int, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        slots = torch.randperm(SLOTS, generator=generator)[:3].numpy()
        vectors = torch.randn(3, WIDTH, generator=generator).bfloat16()
        kept.park(slots, vectors)
        expected |= dict(zip(slots.tolist(), vectors.clone(), strict=True))
    order = np.array(sorted(expected))
    assert torch.equal(kept.take(order), torch.stack([expected[slot] for slot in order]))
    assert kept.stored == len(expected)


def test_memory_grows_with_use() -> None:
    growing = pool()
    row, eighth = WIDTH * 4, 3
    for used in range(1, SLOTS + 1):
        growing.park(np.array([used - 1]), torch.ones(1, WIDTH))
        assert growing.allocated_bytes == -(-used // eighth) * eighth * row


def test_another_process_reads_what_one_wrote() -> None:
    writer = pool()
    writer.park(np.array([3, 9]), torch.arange(2.0 * WIDTH).view(2, WIDTH))
    shared = list(writer._chunks)
    reader = pool(places=shared, writes=False)
    # the reader is ahead: it must not need what the writer has not written yet
    late = torch.full((1, WIDTH), 5.0)
    reader.park(np.array([3, 9]), torch.arange(2.0 * WIDTH).view(2, WIDTH))
    reader.park(np.array([4]), late)
    assert torch.equal(reader.take(np.array([4])), late)
    assert torch.equal(reader.take(np.array([9, 3])), writer.take(np.array([9, 3])))
    writer.park(np.array([4]), late)
    assert torch.equal(reader.take(np.array([4])), late)


@pytest.mark.parametrize("span", [(0, WIDTH), (0, 2), (2, WIDTH)])
def test_a_restored_pool_is_the_same(span: tuple[int, int]) -> None:
    whole = pool()
    generator = torch.Generator().manual_seed(1)
    for slot in (5, 1, 17, 2, 8, 5):
        whole.park(np.array([slot]), torch.randn(1, WIDTH, generator=generator))
    again = pool(span=span)
    again.load(whole.places(), [chunk.clone() for chunk in whole.chunks()])
    slots = np.arange(SLOTS)
    assert torch.equal(again.take(slots), whole.take(slots)[:, slice(*span)])
    assert again.stored == whole.stored == 5
    again.park(np.array([3]), torch.zeros(1, span[1] - span[0]))
    assert again.stored == 6
