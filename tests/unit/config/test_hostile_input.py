"""Configuration that no honest user writes: bounded work, short messages, no secrets in them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from relora_ds.config.load import dump_run_config, load_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.source import MAX_VALUES, read_json, read_yaml
from relora_ds.config.schema import RunConfig
from relora_ds.errors import ConfigError

ROOT = Path(__file__).parents[3]
RUN = "configs/run/quickstart.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def refusal(*overrides: str) -> list[str]:
    """Problems of the quickstart with overrides, found in bounded time."""
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_run_config(RUN, overrides)
    assert time.process_time() - started < 5
    assert all(len(problem) < 1000 for problem in caught.value.problems)
    return caught.value.problems


def numeric_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, type]]:
    """Dotted keys of every plain number of a run, with its type, but for the method's."""
    found = []
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += numeric_keys(kind, f"{prefix}{name}.")
            elif kind in (int, float):
                found.append((f"{prefix}{name}", kind))
    return sorted(set(found), key=str)


ABSURD = ("-1e300", ".inf", "-.inf", ".nan", "1e999", "-3")
"""No key may have them. A learning rate of 1e300 is absurd too, but it is a number."""


@pytest.mark.parametrize(
    ("key", "kind"), [(k, t) for k, t in numeric_keys() if not k.endswith("seed")]
)
def test_absurd_numbers(key: str, kind: type) -> None:
    for value in (*ABSURD, *(("1e300", "9" * 400, "1e15") if kind is int else ())):
        problems = refusal(f"{key}={value}")
        assert any(key in problem for problem in problems), (value, problems)


SIZES = {
    "hidden_size": 2**40,
    "num_hidden_layers": 10**9,
    "vocab_size": 10**12,
    "intermediate_size": 2**63,
    "num_attention_heads": 10**30,
    "max_position_embeddings": 10**400,
}


@pytest.mark.parametrize("key", SIZES)
def test_models_that_no_machine_holds(key: str, tmp_path: Path) -> None:
    text = (ROOT / "configs/model/llama_9m.json").read_text()
    size = SIZES[key]
    path = tmp_path / "model.json"
    path.write_text(text.replace(f'"{key}": ', f'"{key}": {size}, "_was": '))
    assert any(key in problem for problem in refusal(f"model={path}"))


def test_no_dimension_is_unbounded() -> None:
    for name, field in ModelConfig.model_fields.items():
        if int in (field.annotation, *get_args(field.annotation)) and "token_id" not in name:
            assert any(hasattr(bound, "le") for bound in field.metadata), name


@pytest.mark.parametrize("key", ["output_dir", "model", "deepspeed", "train.init_from"])
@pytest.mark.parametrize("value", ["''", "'  '", '"a\\0b"', '"\\0"', "'" + "x" * 5000 + "'"])
def test_names_that_no_file_can_have(key: str, value: str) -> None:
    assert any("path" in problem for problem in refusal(f"{key}={value}"))


BOMBS: dict[str, str] = {
    "values": "a: [" + "1, " * (MAX_VALUES + 5) + "]",
    "keys": "\n".join(f"key_{n}: 1" for n in range(MAX_VALUES)),
    "depth": "a: " + "[" * 5000,
    "aliases": "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]",
    "merge": "a: &a {x: 1}\nb: {<<: *a}",
    "size": "a: '" + "x" * (1 << 20) + "'",
    "python": "a: !!python/object/apply:os.system [echo]",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("read", [read_yaml, read_json], ids=["yaml", "json"])
def test_files_that_grow(bomb: str, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_text(BOMBS[bomb])
    started = time.process_time()
    try:
        problems = read(path).problems
    except ConfigError as error:
        problems = error.problems
    assert problems
    assert time.process_time() - started < 10
    assert len("".join(problems)) < 500


def test_problems_beyond_count_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(f"key_{n}: 1" for n in range(3000)))
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    *_, last = caught.value.shown
    assert len(caught.value.shown) == 51
    assert last.startswith("and 2,9")
    assert len(str(caught.value)) < 20_000


SECRET = "sk-9f8e7d6c5b4a"


@pytest.mark.parametrize(
    "override",
    [
        f"log.wandb.api_key={SECRET}",
        f"hf_token={SECRET}",
        f"train.password=[{SECRET}",
        f"optimizer.lr={{secret: {SECRET}}}",
        f"train.init_from={{url: 'https://user:{SECRET}@host/x'}}",
        f"https://user:{SECRET}@host/x",
        f"data={{credentials: {SECRET}}}",
        f"api_key: {SECRET}",
        f"api_key: {SECRET}==",
        f"api_key[{SECRET}",
        f"log.wandb.auth={SECRET}",
        f"db_pwd={SECRET}",
        f"optimizer.lr=https://host/?token={SECRET}",
        f"train.steps=https://user:p@{SECRET}@host",
    ],
)
def test_secrets_are_not_repeated(override: str) -> None:
    assert not [problem for problem in refusal(override) if SECRET in problem]


@pytest.mark.parametrize("value", ["x" * 100_000, "9" * 100_000, "a-" * 50_000, " a" * 50_000])
def test_long_values_take_no_longer_than_their_length(value: str) -> None:
    refusal(f"train.steps={value}")


def test_what_is_written_holds_no_password_of_a_url() -> None:
    overrides = [f"train.init_from=https://user:{SECRET}@host/model", "method={name: full}"]
    text = dump_run_config(load_run_config(RUN, overrides).config)
    assert SECRET not in text
    assert "https://[redacted]@host/model" in text


def test_control_characters_are_not_printed() -> None:
    problems = refusal("\x1b[31mtrain.steps\x07=3", "a\x1b[2Jb")
    assert all(problem.isprintable() for problem in problems)
