"""HF model files: old and new spellings read the same, and nothing that matters is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora_ds.config.architecture import read_model_config
from relora_ds.config.model import ModelConfig
from relora_ds.errors import ConfigError

Write = Callable[..., Path]


def model_problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read_model_config(path)
    return error.value.problems


def test_defaults_follow_from_the_heads(write_model: Write) -> None:
    config = read_model_config(write_model(num_key_value_heads=None, head_dim=None))
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.pad_token_id is None
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 500000, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5},
    ],
)
def test_rope_is_read_in_every_spelling(write_model: Write, changes: dict[str, Any]) -> None:
    assert read_model_config(write_model(**changes)).rope_theta == 500000.0


def test_the_authors_spelling(write_model: Write) -> None:
    path = write_model(
        architectures=["LLaMAForCausalLM"], max_position_embeddings=..., max_sequence_length=1024,
        pad_token_id=-1, model_type="llama", transformers_version="4.28.1", use_cache=True,
    )  # fmt: skip
    config = read_model_config(path)
    assert (config.max_position_embeddings, config.pad_token_id) == (1024, None)


def test_an_explicit_head_dim_frees_the_width(write_model: Write) -> None:
    assert read_model_config(write_model(hidden_size=66, head_dim=16)).head_dim == 16


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, pad_token_id=0)
    (tmp_path / "config.json").write_text(written.to_json_string(use_diff=False))
    config = read_model_config(tmp_path / "config.json")
    assert (config.hidden_size, config.head_dim, config.rope_theta) == (64, 16, 10000.0)


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({"hidden_act": "gelu"}, "hidden_act", "is \"gelu\", but must be 'silu'"),
        ({"model_type": "gemma"}, "model_type", 'it must be one of "llama"'),
        ({"model_type": "mistral"}, "model_type", "sliding_window: null"),
        ({"bias": True}, "bias", "attention_bias"),
        ({"architectures": ["OPTForCausalLM"]}, "architectures", "LlamaForCausalLM"),
        ({"pretraining_tp": -2}, "pretraining_tp", "must be a number of slices"),
        ({"attention_dropout": 0.1}, "attention_dropout", "is 0.1, which is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "must be null or absent"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type", '"dynamic"'),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor", "or equal to"),
        ({"rope_scaling": {"type": "yarn", "spread": 2}}, "rope_scaling.spread", "unknown key"),
        ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor", "has no such key"),
        ({"rope_scaling": 2}, "rope_scaling", "must be null or an object"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5},
            "rope_theta",
            "but rope_parameters.rope_theta is 10000.0",
        ),
        ({"rope_theta": -1}, "rope_theta", "greater than 0"),
        ({"max_sequence_length": 64}, "max_sequence_length", "max_position_embeddings is 256"),
        ({"hiden_size": 64}, "hiden_size", "did you mean `hidden_size`?"),
        ({"num_attention_heads": 5}, "num_attention_heads", "must divide hidden_size (64)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "must divide num_attention_heads (4)"),
        ({"head_dim": 15}, "head_dim", "is 15, but must be even"),
        ({"vocab_size": "2k"}, "vocab_size", 'is "2k", but must be an integer'),
        ({"hidden_size": True}, "hidden_size", "is true, but must be an integer"),
        ({"eos_token_id": [2, 2049]}, "eos_token_id", "is 2049, but must be less than"),
        ({"eos_token_id": []}, "eos_token_id", "at least 1"),
        ({"eos_token_id": 2048}, "eos_token_id", "less than vocab_size (2048)"),
        ({"pad_token_id": -2}, "pad_token_id", "greater than or equal to 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings", "write true or false"),
    ],
)
def test_one_problem_with_line_key_and_rule(
    write_model: Write, changes: dict[str, Any], key: str, part: str
) -> None:
    path = write_model(**changes)
    problems = model_problems(path)
    assert len(problems) == 1, problems
    lines = path.read_text().splitlines()
    name = f'"{key.rpartition(".")[2]}"'
    line = max(number for number, text in enumerate(lines, 1) if name in text)
    assert problems[0].startswith(f"{path}:{line}: {key}: ")
    assert part in problems[0]


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_type": "linear", "factor": 4}),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"rope_type": "llama3", **LLAMA3}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {"rope_type": "llama3", **LLAMA3},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32}},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_scalings_are_read(
    write_model: Write, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    scaling = read_model_config(write_model(**changes)).rope_scaling
    assert scaling is not None
    assert scaling.model_dump(exclude_defaults=True) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining_tp": 4},
        {"is_llama_config": True, "rope_interleaved": False},
        {"unsloth_version": "2024.9", "unsloth_fixed": True, "_comment": "mine"},
        {"context_window_size": 4096, "prefill_chunk_size": 1024, "tensor_parallel_shards": 1},
        {"auto_map": {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None,
         "num_key_value_heads": 4},
        {"repetition_penalty": 1.0, "bad_words_ids": None, "tokenizer_class": None},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 1024},
    ],
)  # fmt: skip
def test_what_does_not_change_the_function_is_accepted(
    write_model: Write, changes: dict[str, Any]
) -> None:
    plain = read_model_config(write_model()).model_dump(exclude={"rope_scaling"})
    changed = read_model_config(write_model(**changes)).model_dump(exclude={"rope_scaling"})
    assert changed == plain


def test_families_keep_their_own_defaults(write_model: Write) -> None:
    mistral = {"model_type": "mistral", "sliding_window": None, "num_attention_heads": 16}
    config = read_model_config(write_model(**mistral, num_key_value_heads=...))
    assert config.num_key_value_heads == 8
    biased = read_model_config(write_model(model_type="internlm", bias=True))
    assert biased.attention_bias
    assert not biased.mlp_bias


@pytest.mark.parametrize(("given", "kept"), [([2, 9], (2, 9)), ([7], 7), (None, None)])
def test_several_ids_may_end_a_text(write_model: Write, given: object, kept: object) -> None:
    assert read_model_config(write_model(eos_token_id=given)).eos_token_id == kept


def test_what_is_read_survives_a_file(write_model: Write) -> None:
    changes = {"eos_token_id": [2, 9], "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    config = read_model_config(write_model(**changes))
    assert ModelConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_a_directory_stands_for_its_config(write_model: Write, tmp_path: Path) -> None:
    path = write_model()
    folder = tmp_path / "model of mine"
    folder.mkdir()
    (folder / "config.json").write_text(path.read_text())
    assert read_model_config(folder) == read_model_config(path)
    (folder / "config.json").unlink()
    assert "config.json: cannot be read" in model_problems(folder)[0]


def test_missing_keys_are_named_with_their_meaning(write_model: Write) -> None:
    problems = model_problems(write_model(hidden_size=..., vocab_size=...))
    assert len(problems) == 2
    assert "vocab_size: is missing" in problems[0]
    assert "Rows of the embedding" in problems[0]


def test_duplicate_keys_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text('{\n"hidden_size": 64,\n"hidden_size": 128}')
    problems = model_problems(path)
    assert f"{path}:3: hidden_size: duplicate key; first on line 2; keep one of them" in problems


def test_all_problems_at_once(write_model: Write) -> None:
    path = write_model(hidden_act="gelu", num_key_value_heads=3, foo=1, vocab_size=0)
    assert len(model_problems(path)) == 4
    assert json.loads(path.read_text())["foo"] == 1
