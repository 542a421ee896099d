"""Settings that are registered while the program runs are settings like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from relora_ds.config import methods as settings_package
from relora_ds.config.base import PositiveFloat, PositiveInt, Section
from relora_ds.config.keys import run_keys
from relora_ds.config.load import dump_run_config, load_run_config
from relora_ds.config.methods.base import MethodSettings, WarmStarted
from relora_ds.config.methods.catalogue import (
    MethodConfig,
    method_models,
    register_settings,
    registered,
)
from relora_ds.config.methods.relora import ReLoRAConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.methods.registry import METHODS

ROOT = Path(__file__).parents[3]
NAMES = ["full", "galore", "lora", "low_rank", "relora", "sltrain", "switchlora"]
ProblemsOf = Callable[..., list[str]]


class CoreConfig(Section):
    """A section within the settings."""

    depth: PositiveInt = 2
    """Layers of it."""


class ToyConfig(WarmStarted):
    """Settings that no module of the package knows."""

    name: Literal["toy"]
    """Registry key."""
    rank: PositiveInt = 8
    """Smaller than both sides of every projection."""
    span: PositiveInt
    """Steps of something; less than the run's."""
    pair: tuple[PositiveFloat, PositiveFloat] = (1.0, 2.0)
    """In YAML a list."""
    core: CoreConfig = CoreConfig()
    """More of it."""

    @property
    def low_rank(self) -> int:
        return self.rank

    def rules(self) -> tuple[Rule, ...]:
        return (*super().rules(), self.span_ends, self.core_fits, self.pair_ascends)

    def warnings(self) -> tuple[Rule, ...]:
        return (*super().warnings(), self.span_is_odd)

    def span_ends(self, train: TrainConfig) -> Iterator[Finding]:
        if self.span >= train.steps:
            yield Finding(("method", "span"), f"is {self.span}, the run has {train.steps}")

    def core_fits(self, architecture: ModelConfig) -> Iterator[Finding]:
        if self.core.depth > architecture.num_hidden_layers:
            yield Finding(("method", "core", "depth"), "is deeper than the model")

    def pair_ascends(self) -> Iterator[Finding]:
        if self.pair[0] > self.pair[1]:
            yield Finding(("method", "pair"), "descends")

    def span_is_odd(self) -> Iterator[Finding]:
        if not self.span % 2:
            yield Finding(("method", "span"), "is even")


@pytest.fixture
def toy() -> Iterator[None]:
    with registered(ToyConfig):
        yield


@pytest.fixture
def toy_file(tmp_path: Path, run_text: str) -> Path:
    """The valid run with the toy in place of ReLoRA; its keys are on lines 5 to 7."""
    start, end = run_text.index("  name: relora"), run_text.index("data:")
    section = "  name: toy\n  span: 7\n  pair: [2, 3]\n"
    path = tmp_path / "toy.yaml"
    path.write_text(run_text[:start] + section + run_text[end:])
    return path


def test_settings_methods_and_examples_name_the_same_methods() -> None:
    examples = {
        yaml.safe_load(path.read_text())["method"]["name"]
        for path in (ROOT / "configs/run").glob("*.yaml")
    }
    assert set(NAMES) == method_models().keys() == METHODS.keys() == examples


def test_every_module_of_settings_is_a_method_or_what_methods_share() -> None:
    modules = {path.stem for path in Path(settings_package.__path__[0]).glob("*.py")}
    assert modules == {*method_models(), "__init__", "base", "adapter", "catalogue"}


def test_every_method_is_the_one_that_its_settings_are_for() -> None:
    for name, model in method_models().items():
        assert model.__module__ == f"relora_ds.config.methods.{name}"
        assert METHODS[name].__module__.startswith(f"relora_ds.methods.{name}")


@pytest.mark.usefixtures("toy")
def test_a_run_file_may_name_it(toy_file: Path, tmp_path: Path) -> None:
    run = load_run_config(toy_file)
    expected = ToyConfig(name="toy", span=7, pair=(2.0, 3.0))
    assert run.config.method == expected
    assert type(run.config.method) is ToyConfig
    assert run.warnings == ()
    assert load_run_config(toy_file, ["method.span=8"]).warnings == (
        "command line: method.span=8: is even",
    )
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_run_config(run.config))
    assert load_run_config(dumped).config == run.config
    data = run.config.model_dump(mode="json")
    assert data["method"] == {
        "name": "toy", "warm_start_steps": 0, "warm_start_lr": None, "rank": 8,
        "span": 7,        "pair": [2.0, 3.0], "core": {"depth": 2},
    }  # fmt: skip
    assert RunConfig.model_validate_json(json.dumps(data)) == run.config
    assert RunConfig.model_validate(run.config.model_dump()) == run.config
    assert TypeAdapter(MethodConfig).validate_python(expected) == expected


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("old", "new", "place", "parts"),
    [
        ("pair:", "pairs:", 7, ("method.pairs: unknown key; did you mean `pair`?",)),
        ("  span: 7\n", "", 4, ("method.span: is missing", "less than the run's")),
        ("span: 7", "span: 0", 6, ("method.span: is 0, but must be greater than 0",)),
        ("[2, 3]", "[2]", 7, ("method.pair: is [2], but needs an entry [1]",)),
        ("[2, 3]", "[2, -3]", 7, ("method.pair[1]: is -3, but must be greater than 0",)),
        (
            "span: 7", "span: 7\n  core: {dept: 3}", 7,
            ("method.core.dept: unknown key; did you mean `depth`?",),
        ),
        ("span: 7", "span: 7\n  core: {depth: 3}", 7, ("method.core.depth: is deeper than the",)),
        ("[2, 3]", "[3, 2]", 7, ("method.pair: descends",)),
        ("span: 7", "span: 63\n  warm_start_steps: 1000", 7, ("(1000), or the method never",)),
        ("span: 7", "span: 7\n  rank: 64", 7, ("rank: is 64, but must be less than both sides",)),
        ("span: 7", "span: 7\n  merge_every: 3", 7, ("belongs to method relora", "method is toy")),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_said_as_of_any_other(
    toy_file: Path,
    old: str,
    new: str,
    place: int,
    parts: tuple[str, ...],
    problems_of: ProblemsOf,
) -> None:
    toy_file.write_text(toy_file.read_text().replace(old, new, 1))
    (problem,) = problems_of(toy_file)
    assert problem.startswith(f"{toy_file}:{place}: ")
    for part in parts:
        assert part in problem


@pytest.mark.usefixtures("toy")
def test_a_broken_section_hides_only_the_rules_that_read_it(
    toy_file: Path, problems_of: ProblemsOf
) -> None:
    method = ["method.span=1000", "method.rank=64", "method.pair=[3, 2]"]
    span, *others = [
        "command line: method.span=1000: is 1000, the run has 1000",
        "command line: method.rank=64: is 64, but must be less than both sides of every",
        "command line: method.pair=[3, 2]: descends",
    ]
    train = 'command line: train.steps=soon: is "soon", but must be an integer'

    for overrides, expected in (
        (method, [span, *others]),
        ([*method, "train.steps=soon"], [train, *others]),
    ):
        report = problems_of(toy_file, *overrides)
        assert len(report) == 3
        for start in expected:
            assert sum(problem.startswith(start) for problem in report) == 1


@pytest.mark.usefixtures("toy")
def test_other_sections_and_methods_know_its_keys(run_file: Path, problems_of: ProblemsOf) -> None:
    assert {"method.span", "method.core", "method.core.depth"} <= run_keys()
    assert problems_of(run_file, "checkpoint.allow_change=[method.span]") == []
    (problem,) = problems_of(run_file, "method.span=3")
    assert "belongs to method toy, but this run's method is relora" in problem
    (problem,) = problems_of(run_file, "method={name: to}")
    known = ", ".join([*NAMES, "toy"])
    assert f'is "to", but must be one of {known}; did you mean `toy`?' in problem


def test_it_is_unknown_before_and_after(toy_file: Path, problems_of: ProblemsOf) -> None:
    def unknown() -> list[str]:
        assert list(method_models()) == NAMES
        assert "method.span" not in run_keys()
        with pytest.raises(ValidationError, match="union_tag_invalid"):
            TypeAdapter(MethodConfig).validate_python({"name": "toy", "span": 3})
        return problems_of(toy_file)

    before = unknown()
    with registered(ToyConfig):
        assert problems_of(toy_file) == []
    assert before == unknown()
    (problem,) = before
    assert problem.startswith(
        f'{toy_file}:5: method.name: is "toy", but must be one of {", ".join(NAMES)}; valid names'
    )


def test_it_is_forgotten_when_something_goes_wrong() -> None:
    with pytest.raises(KeyError, match="inside"), registered(ToyConfig):
        raise KeyError("inside")
    assert "toy" not in method_models()


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="'relora' is registered already, as ReLoRAConfig"):
        register_settings(ReLoRAConfig)
    assert method_models()["relora"] is ReLoRAConfig


def test_a_name_is_one_literal_text() -> None:
    class Nameless(MethodSettings):
        """Inherits a name that may be anything."""

    class TwoNames(MethodSettings):
        """Has two."""

        name: Literal["one", "two"]
        """Registry key."""

    for model in (Nameless, TwoNames):
        with pytest.raises(ValueError, match=f"{model.__name__}.name must be annotated with one"):
            register_settings(model)
    assert list(method_models()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_name_comes_first(name: str) -> None:
    found: dict[str, Any] = TypeAdapter(MethodConfig).dump_python(
        TypeAdapter(MethodConfig).validate_python({"name": name})
    )
    assert next(iter(found)) == "name"
