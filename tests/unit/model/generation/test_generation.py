"""Texts of a model: what is kept changes nothing, and transformers goes on in the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from relora_ds.config.model import ModelConfig
from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.model.generation.cache import CachedModel
from relora_ds.model.generation.sample import Sampling, choose, generate
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.llama import Llama
from relora_ds.randomness import Stream

Build = Callable[[ModelConfig], Llama]


@pytest.mark.parametrize("pieces", [[18], [1] * 18, [7, 1, 1, 9]])
def test_reading_piece_by_piece_computes_what_one_pass_does(
    config: ModelConfig, build: Build, tokens: torch.Tensor, pieces: list[int]
) -> None:
    model = build(config)
    reader, read = CachedModel(model, len(tokens), tokens.shape[1]), 0
    with torch.no_grad():
        whole = model.logits(tokens)
    for size in pieces:
        logits = reader.read(tokens[:, read : read + size])
        read += size
        torch.testing.assert_close(logits, whole[:, read - 1], atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, config: ModelConfig, build: Build
) -> None:
    transformers = pytest.importorskip("transformers")
    model, every = build(config), list[int]()
    write_hf(tmp_path / "hf", config, model.named_parameters(), None, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for prompt in ([5, 17, 3], [40], [9, 60, 61, 62, 13]):
        expected = theirs.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=2
        )[0, len(prompt) :].tolist()
        found = generate(model, prompt, Sampling(20), ends=(2,))
        assert found == [token for token in expected if token != 2]
        assert found == generate(model, prompt, Sampling(20), ends=(2,), cached=False)
        every += found
    assert len(set(every)) > 2


def test_a_text_is_a_function_of_seed_and_number(plain: ModelConfig, build: Build) -> None:
    model, sampling = build(plain), Sampling(12, temperature=1.0, seed=3)
    first = generate(model, [4], sampling)
    assert first == generate(model, [4], sampling, cached=False)
    assert first != generate(model, [4], sampling, text=1)
    assert first != generate(model, [4], Sampling(12, temperature=1.0, seed=4))
    assert len(first) == 12


def test_a_text_ends_where_the_model_ends_it(plain: ModelConfig, build: Build) -> None:
    model = build(plain)
    found = generate(model, [4], Sampling(12))
    last = found[5]
    assert generate(model, [4], Sampling(12), ends=(last,)) == found[: found.index(last)]


def drawn(sampling: Sampling, chances: list[float], count: int = 4000) -> Counter[int]:
    logits, stream = torch.tensor(chances).log(), Stream(sampling.seed, "generate", "text", 0)
    return Counter(choose(logits, sampling, stream, place) for place in range(count))


def test_draws_have_the_chances_of_the_softmax() -> None:
    chances = [0.1, 0.6, 0.3]
    found = drawn(Sampling(temperature=1.0), chances)
    for token, chance in enumerate(chances):
        assert found[token] / 4000 == pytest.approx(chance, abs=0.03)


def test_temperature_sharpens_and_zero_takes_the_likeliest() -> None:
    chances = [0.4, 0.6]
    cold = drawn(Sampling(temperature=0.5), chances)
    assert cold[1] / 4000 == pytest.approx(0.36 / 0.52, abs=0.03)
    assert drawn(Sampling(temperature=0.0), chances, 5) == Counter({1: 5})


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, {1}), (0.59, {1}), (0.61, {1, 2}), (0.95, {0, 1, 2}), (1e-9, {1})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    found = drawn(Sampling(temperature=1.0, top_p=top_p), [0.1, 0.6, 0.3])
    assert set(found) == kept
    if kept == {1, 2}:
        assert found[1] / 4000 == pytest.approx(2 / 3, abs=0.03)


def test_what_does_not_fit_the_context_is_refused(plain: ModelConfig, build: Build) -> None:
    model = build(plain)
    with pytest.raises(ConfigError, match="takes 1 to 64 tokens in all"):
        generate(model, [4] * 60, Sampling(5))
    with pytest.raises(ConfigError, match="0 tokens of the prompt"):
        generate(model, [], Sampling(5))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top-p is 0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"max_tokens": 0}, "max-tokens is 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e9])
def test_ids_that_stand_for_no_token_are_never_chosen(
    plain: ModelConfig, build: Build, temperature: float
) -> None:
    model, sampling = build(plain), Sampling(40, temperature=temperature)
    assert max(generate(model, [4], sampling)) >= 8
    assert max(generate(model, [4], sampling, known=8)) < 8


def test_the_smallest_temperature_takes_the_likeliest() -> None:
    logits, stream = torch.tensor([3.0, 40.0, -7.0]), Stream(0, "generate", "text", 0)
    assert choose(logits, Sampling(temperature=5e-324), stream, 0) == 1


def test_a_model_that_diverged_is_named(plain: ModelConfig, build: Build) -> None:
    model = build(plain)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="logits are not finite"):
        generate(model, [4], Sampling(3))
