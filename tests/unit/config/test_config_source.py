"""YAML 1.2 scalars, JSON, and writing back: text and data mean the same both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from relora_ds.config.reading.document import Document, Place, key_name
from relora_ds.config.reading.source import dump_yaml, parse_value, read_json, read_yaml
from relora_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("-1.5E+2", -150.0), ("-.inf", float("-inf")),
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("+3", 3), ("-7", -7),
        ("yes", "yes"), ("on", "on"), ("No", "No"), ("n", "n"), ("1_000", "1_000"),
        ("true", True), ("False", False), ("tRue", "tRue"),
        ("null", None), ("~", None), ("2024-01-01", "2024-01-01"), ("12:30:00", "12:30:00"),
        ("0b11", "0b11"), ("1.2.3", "1.2.3"), ("'3'", "3"), ("=", "="), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_follow_the_yaml_1_2_core_schema(text: str, value: object) -> None:
    parsed = parse_value(text, Place("test"))
    assert parsed == value
    assert type(parsed) is type(value)


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20)
NUMBERS = st.floats(allow_nan=False)
TREES = st.recursive(
    SCALARS | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(tree=st.dictionaries(st.sampled_from("abc"), TREES, min_size=1))
def test_what_is_dumped_is_read_back(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text(dump_yaml(tree), encoding="utf-8")
    assert read_yaml(path).data == tree


@SETTINGS
@given(tree=st.dictionaries(st.sampled_from("abc"), TREES), indent=st.sampled_from([None, 2, "\t"]))
def test_json_has_its_own_values(tmp_path: Path, tree: dict[str, Any], indent: Any) -> None:
    path = tmp_path / "tree.json"
    text = json.dumps(tree, indent=indent)
    assume("Infinity" not in text)  # which json writes and reads, but is not JSON
    path.write_text(text)
    assert read_json(path).data == json.loads(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a": 1,\n}', ":2: is not valid JSON"),
        ("{'a': 1}", ":1: is not valid JSON"),
        ("a: 1", ":1: is not valid JSON"),
        ("", ":1: is not valid JSON"),
        ("[1]", ":1: must be a mapping"),
        ("[" * 100_000, "is not usable JSON"),
    ],
)
def test_broken_json_is_called_json(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_json(path)
    assert part in str(error.value)


def test_every_value_keeps_its_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "places.yaml"
    path.write_text("a:\n  b: [1,\n      2]\nc: 3\n")
    document = read_yaml(path)
    assert document.places[("a", "b")] == Place(str(path), 2, 3)
    assert document.places[("a", "b", 1)] == Place(str(path), 3, 7)
    assert str(document.places[("c",)]) == f"{path}:4"


def test_assigning_forgets_what_stood_there() -> None:
    document = Document("test", {"a": {"b": 1}}, {("a", "b"): Place("test", 1)})
    document.assign(("a",), {"c": 2}, Place("argument"))
    assert document.data == {"a": {"c": 2}}
    assert document.places == {("a",): Place("argument")}
    assert key_name(("a", 0, "b")) == "a[0].b"
