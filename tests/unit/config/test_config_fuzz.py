"""Whatever is in the files and on the command line: loading works or raises ConfigError."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relora_ds.config.architecture import read_model_config
from relora_ds.config.keys import run_keys
from relora_ds.config.load import dump_run_config, load_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.errors import ConfigError

SETTINGS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from(["relora", "lora", "zero", "bf16", "builtin", "", "a.b", "\x00", "1e3", "*a"])
    | st.text(max_size=6)
)
TREES = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([key.rpartition(".")[2] for key in run_keys()]), inner)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(sorted(run_keys())) | st.text(max_size=8)


@SETTINGS
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content)
    expect_config_error_at_most(path, [])


@SETTINGS
@given(edits=st.lists(st.tuples(KEYS, TREES), min_size=1, max_size=5))
def test_any_value_at_any_key(run_file: Path, edits: list[tuple[str, Any]]) -> None:
    expect_config_error_at_most(run_file, [f"{key}={json.dumps(value)}" for key, value in edits])


@SETTINGS
@given(cut=st.integers(0, 420), text=st.text(max_size=5))
def test_any_splice(tmp_path: Path, run_text: str, cut: int, text: str) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes((run_text[:cut] + text + run_text[cut + len(text) :]).encode())
    expect_config_error_at_most(path, [])


@SETTINGS
@given(overrides=st.lists(st.text(max_size=12), max_size=3))
def test_any_argument(run_file: Path, overrides: list[str]) -> None:
    expect_config_error_at_most(run_file, overrides)


@SETTINGS
@given(
    model=st.dictionaries(
        st.sampled_from([*ModelConfig.model_fields, "rope_scaling", "architectures"]), TREES
    )
)
def test_any_model(tmp_path: Path, model: dict[str, Any]) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model))
    with contextlib.suppress(ConfigError):
        read_model_config(path)


def expect_config_error_at_most(path: Path, overrides: list[str]) -> None:
    try:
        run = load_run_config(path, overrides)
    except ConfigError:
        return
    dumped = path.with_name("dumped.yaml")
    dumped.write_text(dump_run_config(run.config), encoding="utf-8")
    assert load_run_config(dumped).config == run.config
