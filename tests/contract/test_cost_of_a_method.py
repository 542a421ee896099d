"""What one more method costs: its settings file, its own room, a line in the registry, a run file.

Counted in the code that is there: no other module of the package may know a method's classes or
spell its name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from relora_ds.config.methods.catalogue import method_models
from relora_ds.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "relora_ds"
REGISTRY = PACKAGE / "methods" / "registry.py"
NAMES = sorted(METHODS.keys() - {"full"})
"""Full-rank training is what others fall back to: warm starts and exports use it by name."""


def own_files(name: str) -> set[Path]:
    """The files that belong to a method: its settings, its module or its folder."""
    folder = PACKAGE / "methods" / name
    room = set(folder.rglob("*.py")) if folder.is_dir() else {folder.with_suffix(".py")}
    return room | {PACKAGE / "config" / "methods" / f"{name}.py"}


def mentions(path: Path, words: set[str], name: str) -> Iterator[str]:
    """Classes that a module imports or names, and comparisons of a name with the method's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name in words)
        elif isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            if word in words:
                yield word
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            constants = [c.value for side in sides for c in ast.walk(side) if _is_constant(c)]
            if name in constants and ("name" in asked or "method" in asked):
                yield ast.unparse(node)


def _is_constant(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_else_knows_a_method(name: str) -> None:
    own = own_files(name)
    assert all(path.is_file() for path in own), own
    words = {method_models()[name].__name__, METHODS[name].__name__}
    found = {
        str(path.relative_to(ROOT)): sorted(set(mentions(path, words, name)))
        for path in PACKAGE.rglob("*.py")
        if path not in own | {REGISTRY} and any(mentions(path, words, name))
    }
    assert not found, "a rule, a default or a special case of one method outside of its room"


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_names_it_once(name: str) -> None:
    tree = ast.parse(REGISTRY.read_text())
    literals = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value == name]
    assert len(literals) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_run_file_trains_it(name: str) -> None:
    files = [
        p for p in (ROOT / "configs" / "run").glob("*.yaml") if f"name: {name}" in p.read_text()
    ]
    assert files
