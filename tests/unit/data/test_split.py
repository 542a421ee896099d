"""Holding out a share: whole documents from all over a file, disjoint from what is trained on."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_ds.config.sections import DataConfig
from relora_ds.data.batches import TrainingBatches, ValidationBatches, unigram_perplexity
from relora_ds.data.source import Corpus, open_corpus
from relora_ds.data.token_files import split
from relora_ds.data.token_files.split import BlendedSamples, TokenPart, hold_out
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import DataError

Write = Callable[..., TokenFile]


def documents(lengths: list[int], first: int = 0) -> list[list[int]]:
    """Documents of these lengths in which every id occurs once."""
    ids = iter(range(first, first + sum(lengths)))
    return [[next(ids) for _ in range(length)] for length in lengths]


def everything(part: TokenPart) -> list[int]:
    return part.window(0, part.num_tokens).tolist()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37, 0.5, 0.9])
def test_whole_documents_and_every_token_once(write_tokens: Write, share: float) -> None:
    lengths = random.Random(3).choices(range(1, 40), k=1500)
    texts = documents(lengths)
    kept, held = hold_out(write_tokens(texts), share)
    kept_ids, held_ids = set(everything(kept)), set(everything(held))
    assert len(kept_ids) + len(held_ids) == sum(lengths)
    assert sorted(kept_ids | held_ids) == list(range(sum(lengths)))
    for text in texts:
        assert {*text} <= held_ids or {*text} <= kept_ids
    assert abs(held.num_tokens - share * sum(lengths)) <= max(lengths) / 2
    assert everything(held) == sorted(held_ids), "in the order of the file"


def test_documents_come_from_all_over_the_file(write_tokens: Write) -> None:
    file = write_tokens(documents([6] * 3000))
    _, held = hold_out(file, 0.02)
    tenths = np.histogram(everything(held), bins=10, range=(0, file.num_tokens))[0]
    assert tenths.tolist() == [36] * 10


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any),
    share=st.floats(0.001, 0.999),
)
def test_any_file_and_any_share(lengths: list[int], share: float) -> None:
    file = in_memory(lengths)
    kept, held = hold_out(file, share)
    assert kept.num_tokens + held.num_tokens == sum(lengths)
    assert sorted(everything(kept) + everything(held)) == list(range(sum(lengths)))
    bounds = {file.document_start(n) for n in range(len(lengths) + 1)}
    assert {*kept.spans.flat, *held.spans.flat} <= bounds
    assert abs(held.num_tokens - share * sum(lengths)) <= max(lengths) / 2 + 1e-9


def in_memory(lengths: list[int]) -> TokenFile:
    """A token file of these documents, counted from 0, that is nowhere on a disk."""
    file = object.__new__(TokenFile)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    file.prefix, file.num_tokens, file.num_documents = "m", int(starts[-1]), len(lengths)
    vars(file)["document_start"] = lambda number: int(starts[number])
    vars(file)["window"] = lambda start, count: np.arange(start, start + count)
    return file


def test_windows_cross_spans(write_tokens: Write) -> None:
    kept, _ = hold_out(write_tokens(documents([7] * 400)), 0.25)
    whole = everything(kept)
    assert len(kept.spans) > 50
    for start, count in ((0, 1), (3, 90), (20, 0), (kept.num_tokens - 33, 33), (21, 21)):
        window = kept.window(start, count)
        assert window.dtype == np.int64
        assert window.tolist() == whole[start : start + count]
    for start, count in ((-1, 2), (0, kept.num_tokens + 1), (kept.num_tokens, 1), (3, -1)):
        with pytest.raises(IndexError, match="outside of"):
            kept.window(start, count)


def test_a_blend_is_validated_by_its_weights_and_reads_nothing_twice(write_tokens: Write) -> None:
    first = write_tokens(documents([10] * 300), "first")
    second = write_tokens(documents([10] * 100, first=3000), "second")
    held = [hold_out(file, 0.2)[1] for file in (first, second)]
    blend = BlendedSamples(held, (1.0, 3.0))
    count = blend.num_samples(9)
    samples = [blend.sample(number, 9) for number in range(count)]
    assert len({int(sample[0]) for sample in samples}) == count
    of_second = [bool(sample[0] >= 3000) for sample in samples]
    # the second has 22 windows of 9 tokens, which are three of four to within one
    assert (count, sum(of_second)) == (30, 22)
    assert sum(of_second[:8]) == 6
    with pytest.raises(DataError, match=r"second.bin: data.valid_share 0.2 holds out 200 tokens"):
        blend.num_samples(200)


def corpus(share: float, *blend: tuple[float, TokenFile]) -> Corpus:
    train = [(weight, file.prefix) for weight, file in blend]
    return open_corpus(DataConfig(train=train, valid_share=share))


def test_training_never_sees_what_validation_reads(write_tokens: Write) -> None:
    first = write_tokens(documents([8, 3, 5] * 60), "first")
    second = write_tokens(documents([11] * 50, first=960), "second")
    run = corpus(0.1, (2.0, first), (1.0, second))
    assert run.validation is not None
    batches = TrainingBatches(run.training, run.weights, 4, 6, 3, 0, 1, seed=1)
    trained = {
        t
        for step in range(100)
        for rows in batches.micro_batches(step)
        for t in rows.flatten().tolist()
    }
    validation = ValidationBatches(run.validation, 4, 2, 0, 1)
    validated = {int(t) for tokens, mask in validation for t in tokens[mask].flatten()}
    assert len(validated) > 100
    assert not trained & validated
    assert unigram_perplexity(run.validation, 4) == pytest.approx(validation.num_sequences * 4)


def test_the_same_split_is_recorded_and_another_is_told_apart(
    write_tokens: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tokens(documents([9] * 2000))
    (*_, recorded) = corpus(0.1, (1.0, file)).fingerprints()
    assert recorded.startswith("held out/1:")
    assert corpus(0.1, (5.0, file)).fingerprints()[-1] == recorded
    assert corpus(0.2, (1.0, file)).fingerprints()[-1] != recorded
    assert len(open_corpus(DataConfig(train=file.prefix)).fingerprints()) == 1
    monkeypatch.setattr(split, "_STRETCHES", 10)
    assert corpus(0.1, (1.0, file)).fingerprints()[-1] != recorded


def test_shares_that_leave_nothing_are_refused(write_tokens: Write) -> None:
    file = write_tokens(documents([50] * 10))
    cases = (
        (0.01, r"tokens.bin: data.valid_share 0.01 holds out 0 tokens, but one sample"),
        (0.99, r"tokens.bin: data.valid_share 0.99 leaves for training 0 tokens, but one sample"),
        (0.1, r"holds out 50 tokens, but one sample of train.seq_length 64 takes 65; choose"),
    )
    for share, words in cases:
        with pytest.raises(DataError, match=words) as caught:
            corpus(share, (1.0, file)).check_length(64)
        assert "another share of its 500 tokens in 10 whole documents" in str(caught.value)
    corpus(0.2, (1.0, file)).check_length(64)
