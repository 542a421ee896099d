"""What `pip install .` and the hooks promise agrees with what is pinned, shipped and checked."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DECLARED = [
    Requirement(text)
    for group in (
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
    )
    for text in group
]


def _lines(name: str) -> list[Requirement]:
    """The requirements of a file that pip reads."""
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _ranges(requirements: list[Requirement]) -> dict[str, set[str]]:
    """Ranges and their markers by canonical name, extras left out."""
    found: dict[str, set[str]] = {}
    for requirement in requirements:
        text = f"{requirement.specifier}; {requirement.marker}"
        found.setdefault(canonicalize_name(requirement.name), set()).add(text)
    return found


def test_requirements_and_project_declare_the_same_ranges() -> None:
    listed, declared = _ranges(_lines("requirements.txt")), _ranges(DECLARED)
    assert listed.keys() <= declared.keys()
    assert {name: declared[name] for name in listed} == listed
    dependencies = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    assert _ranges(dependencies).keys() <= listed.keys()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_there_is_one_pin_per_requirement_and_it_is_within_the_range(python: str) -> None:
    here = {"python_version": python}
    pins: dict[str, str] = {}
    for pin in _lines("launch/constraints.txt"):
        if pin.marker is None or pin.marker.evaluate(here):
            name = canonicalize_name(pin.name)
            assert name not in pins, f"{name} is pinned twice"
            pins[name] = str(pin.specifier).removeprefix("==")
    wanted = [r for r in _lines("requirements.txt") if not r.marker or r.marker.evaluate(here)]
    assert pins.keys() == {canonicalize_name(r.name) for r in wanted}
    for requirement in wanted:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def _imported(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_everything_that_the_package_imports_is_declared() -> None:
    distributions = {
        "google": "protobuf",
        "megatron": "megatron-core",
        "pydantic_core": "pydantic",
        "yaml": "pyyaml",
    }
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    files = (ROOT / "relora_ds").rglob("*.py")
    found = {name for path in files for name in _imported(path)}
    foreign = found - set(sys.stdlib_module_names) - {"relora_ds"}
    assert {"torch", "deepspeed", "megatron", "pydantic"} <= foreign
    missing = {canonicalize_name(distributions.get(name, name)) for name in foreign} - declared
    assert not missing


def test_every_file_of_the_package_that_is_no_module_is_shipped() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    for path in (ROOT / "relora_ds").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(path.match(pattern) for pattern in patterns), path


def test_every_folder_of_the_package_is_a_package_that_says_what_it_is() -> None:
    for path in sorted((ROOT / "relora_ds").rglob("*.py")):
        opening = (path.parent / "__init__.py").read_text()
        assert re.match(r'"""\S', opening), f"{path.parent} has no docstring"


def test_the_hooks_are_the_checks_of_the_suite() -> None:
    steps = re.findall(r"^step (.+)$", (ROOT / "launch" / "test.sh").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [re.sub(r"^bash -c '(.*)'$", r"\1", hook["entry"]) for hook in hooks]
    assert entries == [step for step in steps if "pytest" not in step]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)
