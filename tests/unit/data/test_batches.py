"""Batches: the same global batch for every cut, validation that covers each window once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from relora_ds.data.batches import (
    DocumentBatches,
    TrainingBatches,
    ValidationBatches,
    source_names,
    unigram_perplexity,
)
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import ConfigError, DataError

SEQ = 4


def training(
    files: list[TokenFile], micro_batch_size: int = 2, dp_rank: int = 0, dp_size: int = 1
) -> TrainingBatches:
    weights = [3.0, 1.0][: len(files)]
    return TrainingBatches(files, weights, SEQ, 12, micro_batch_size, dp_rank, dp_size, seed=42)


@pytest.fixture
def files(write_tokens: Callable[..., TokenFile]) -> list[TokenFile]:
    """Two files of 25 and 7 samples in which every id occurs once."""
    return [
        write_tokens([list(range(60)), list(range(60, 102))], "first"),
        write_tokens([list(range(200, 230))], "second"),
    ]


def global_batch(files: list[TokenFile], step: int, micro: int, dp_size: int) -> torch.Tensor:
    """All rows of a step, ordered by (micro-batch, rank, row)."""
    ranks = [
        torch.stack([*training(files, micro, rank, dp_size).micro_batches(step)])
        for rank in range(dp_size)
    ]
    return torch.stack(ranks, dim=1).reshape(-1, SEQ + 1)


@pytest.mark.parametrize(("micro", "dp_size"), [(1, 1), (2, 3), (3, 2), (1, 12), (6, 1), (4, 3)])
def test_global_batch_is_the_same_for_every_cut(
    files: list[TokenFile], micro: int, dp_size: int
) -> None:
    for step in (0, 1, 17):
        expected = global_batch(files, step, 12, 1)
        assert torch.equal(global_batch(files, step, micro, dp_size), expected)


def test_rows_are_samples_of_the_files(files: list[TokenFile]) -> None:
    batches = training(files)
    seen: list[int] = []
    for step in range(50):
        micro_batches = [*batches.micro_batches(step)]
        assert len(micro_batches) == batches.num_micro_batches == 6
        for tokens in micro_batches:
            assert tokens.dtype == torch.int64
            assert tokens.shape == (2, SEQ + 1)
            assert torch.equal(tokens - tokens[:, :1], torch.arange(SEQ + 1).expand(2, -1))
            seen += tokens[:, 0].tolist()
    assert {*seen} == {*range(0, 100, SEQ), *range(200, 228, SEQ)}
    first = [token for token in seen if token < 200]
    assert len(first) == 450
    assert sorted(first[25:50]) == list(range(0, 100, SEQ))
    assert batches.epochs(50) == (450 / 25, 150 / 7)


def test_figures_count_the_targets_of_every_source(files: list[TokenFile]) -> None:
    batches = training(files)
    for steps in (0, 1, 50):
        rows = [
            row for step in range(steps) for rows in batches.micro_batches(step) for row in rows
        ]
        second = sum(int(row[0]) >= 200 for row in rows) * SEQ
        assert batches.figures(steps) == {
            "data/tokens/first": 12 * SEQ * steps - second,
            "data/epochs/first": (12 * SEQ * steps - second) / (25 * SEQ),
            "data/tokens/second": second,
            "data/epochs/second": second / (7 * SEQ),
        }


def test_names_of_sources_tell_them_apart() -> None:
    assert source_names(["data/c4/train"]) == ["train"]
    assert source_names(["a/c4/train", "b/c4/train", "wiki"]) == [
        "a/c4/train",
        "b/c4/train",
        "wiki",
    ]
    assert source_names(["train", "x/train", "/train"]) == ["train", "x/train", "/train"]
    assert source_names(["a/w", "a/w", "a/v"]) == ["w#1", "w#2", "v"]


def test_a_step_needs_no_earlier_step(files: list[TokenFile]) -> None:
    batches = training(files)
    steps = [torch.stack([*batches.micro_batches(step)]) for step in range(5)]
    assert torch.equal(torch.stack([*training(files).micro_batches(4)]), steps[4])


def test_unusable_training_data(
    files: list[TokenFile], write_tokens: Callable[..., TokenFile]
) -> None:
    with pytest.raises(ConfigError, match="12 is not a multiple of micro_batch_size 5 times 1"):
        training(files, micro_batch_size=5)
    with pytest.raises(DataError, match=r"4 tokens, but one sample of train\.seq_length 4 takes 5"):
        training([write_tokens([[1, 2], [3, 2]], "short")])
    with pytest.raises(DataError, match="2 token files, but 1 blend weights"):
        TrainingBatches(files, [1.0], SEQ, 12, 2, 0, 1, seed=42)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("micro", [1, 4, 7])
@pytest.mark.parametrize("limit", [None, 1, 6, 99])
def test_validation_covers_every_window_once(
    files: list[TokenFile], dp_size: int, micro: int, limit: int | None
) -> None:
    ranks = [
        ValidationBatches(files[0], SEQ, micro, rank, dp_size, limit) for rank in range(dp_size)
    ]
    batches = [[*rank] for rank in ranks]
    assert {len(got) for got in batches} == {len(ranks[0])}
    starts: list[int] = []
    for number in range(len(ranks[0])):
        for got in batches:
            tokens, mask = got[number]
            assert tokens.shape == (micro, SEQ + 1)
            assert mask.shape == (micro,)
            assert mask.dtype == torch.bool
            assert not tokens[~mask].any()
            starts += tokens[mask][:, 0].tolist()
    wanted = min(25, limit or 25)
    assert ranks[0].num_sequences == wanted
    assert starts == list(range(0, SEQ * wanted, SEQ))


def test_validation_can_be_repeated(files: list[TokenFile]) -> None:
    batches = ValidationBatches(files[0], SEQ, 4, 0, 1)
    for (first, _), (second, _) in zip(batches, batches, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("end", [None, 9])
@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_targets_are_found_wherever_a_rank_is_given_one(
    write_tokens: Callable[..., TokenFile], limit: int | None, end: int | None
) -> None:
    """Empty documents first: the third row, or the third window, is the first with a target."""
    file = write_tokens([[9]] * 2 + [[9, 9], [1, 9], [9]] + [[9]] * 4 + [[5, 6, 7, 9]])
    for kind in (ValidationBatches, DocumentBatches):
        given = [kind(file, SEQ, 1, rank, 2, limit) for rank in range(2)]
        targets = 0
        for tokens, mask in (batch for rank in given for batch in rank):
            whole = mask if mask.dim() == 2 else mask.unsqueeze(1)
            targets += int((whole & (tokens[:, :-1] != (-1 if end is None else end))).sum())
        assert [each.has_targets(end) for each in given] == [targets > 0] * 2


def test_unigram_perplexity_counts_the_targets(
    files: list[TokenFile], write_tokens: Callable[..., TokenFile]
) -> None:
    assert unigram_perplexity(files[0], SEQ) == pytest.approx(100)
    assert unigram_perplexity(files[0], SEQ, max_sequences=3) == pytest.approx(12)
    # 3 of 8 targets follow an id that ends a document
    ended = write_tokens([[1, 9], [2, 9], [3, 4, 5, 9], [6, 7, 8, 10]], "ended")
    assert unigram_perplexity(ended, SEQ, 2, document_end=9) == pytest.approx(
        math.exp(-(3 / 5) * math.log(3 / 5) - 2 * (1 / 5) * math.log(1 / 5))
    )
    skewed = write_tokens([[9, 1, 1, 1, 2, 7]], "skewed")
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_perplexity(skewed, SEQ) == pytest.approx(math.exp(entropy))
