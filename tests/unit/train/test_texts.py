"""Texts from a saved model, as its verb prints them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch

from relora_ds.cli.main import main
from relora_ds.config.model import ModelConfig
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.init import InitialWeights, dense_shapes
from tests.conftest import TinyCorpus

ARCHITECTURE = ModelConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=24,
    initializer_range=0.3,
)


@pytest.fixture
def export(tmp_path: Path, tiny_corpus: TinyCorpus) -> Path:
    """A model with random weights and a real tokenizer."""
    weights = InitialWeights(ARCHITECTURE, seed=1)
    drawn = ((name, weights(name, shape)) for name, shape in dense_shapes(ARCHITECTURE).items())
    write_hf(tmp_path / "hf", ARCHITECTURE, drawn, tiny_corpus.tokenizer, torch.float32)
    return tmp_path / "hf"


def generated(
    capsys: pytest.CaptureFixture[str], export: Path, *arguments: str
) -> list[dict[str, object]]:
    assert main(["generate", "--checkpoint", str(export), "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_prompt_is_gone_on_with(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("--prompt", "The function", "--prompt", "")
    cached, again = (
        generated(capsys, export, *prompts, "--max-tokens", "8", *more)
        for more in ((), ("--no-cache",))
    )
    assert cached == again
    assert [each["prompt"] for each in cached] == ["The function", ""]
    assert all(each["tokens"] == 8 or each["ended"] for each in cached)
    assert all(each["text"] for each in cached)


def test_texts_that_are_drawn_repeat_with_their_seed(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ("--prompt", "a", "--prompt", "a", "--temperature", "1", "--top-p", "0.9", "--seed")
    first = generated(capsys, export, *drawn, "5")
    assert first == generated(capsys, export, *drawn, "5")
    assert first[0]["text"] != first[1]["text"]
    assert first != generated(capsys, export, *drawn, "6")


def test_a_text_stops_at_the_end_of_the_context(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = generated(capsys, export, "--prompt", "def f", "--max-tokens", "1000")
    assert isinstance(found["tokens"], int)
    assert 0 < found["tokens"] < 24


def test_a_prompt_comes_from_standard_input(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The function"))
    (found,) = generated(capsys, export, "--max-tokens", "2")
    assert found["prompt"] == "The function"


def test_a_model_without_a_tokenizer_is_one_sentence(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in export.glob("*token*"):
        path.unlink()
    assert main(["generate", "--checkpoint", str(export), "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "holds no tokenizer" in said


def test_a_vocabulary_larger_than_the_tokenizer_s_is_no_obstacle(
    tmp_path: Path, tiny_corpus: TinyCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = ARCHITECTURE.model_copy(update={"vocab_size": 2048})
    weights = InitialWeights(padded, seed=1)
    drawn = ((name, weights(name, shape)) for name, shape in dense_shapes(padded).items())
    write_hf(tmp_path / "hf", padded, drawn, tiny_corpus.tokenizer, torch.float32)
    (found,) = generated(capsys, tmp_path / "hf", "--prompt", "a", "--temperature", "9")
    assert found["text"]


def test_a_tokenizer_larger_than_the_vocabulary_is_one_sentence(
    tmp_path: Path, tiny_corpus: TinyCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ARCHITECTURE.model_copy(update={"vocab_size": 100})
    weights = InitialWeights(small, seed=1)
    drawn = ((name, weights(name, shape)) for name, shape in dense_shapes(small).items())
    write_hf(tmp_path / "hf", small, drawn, tiny_corpus.tokenizer, torch.float32)
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "a"]) == 3
    assert "the model's vocab_size is 100" in capsys.readouterr().err


@pytest.mark.parametrize("piped", [False, True])
def test_a_prompt_that_is_no_text_is_one_sentence(
    export: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    piped: bool,
) -> None:
    arguments = ["generate", "--checkpoint", str(export)]
    if piped:
        stream = io.TextIOWrapper(io.BytesIO(b"The\xfffunction"), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", stream)
    else:
        arguments += ["--prompt", os.fsdecode(b"The\xfffunction")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said == (
        "error: the prompt is no UTF-8 at its character 4: convert it, or set LANG to the encoding "
        "that it is written in\n"
    )
