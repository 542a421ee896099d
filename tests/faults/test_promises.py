"""Every fault that something is promised about has its tests, and the page names them."""

from __future__ import annotations

import ast

import pytest

from tests.faults.promises import PROMISES
from tests.harness.ranks import ROOT

_PAGE = ROOT / "docs" / "reliability.md"


def test_all_39_are_there() -> None:
    assert list(PROMISES) == list(range(1, 40))


@pytest.mark.parametrize("number", PROMISES)
def test_the_tests_of_a_promise_exist_and_are_on_the_page(number: int) -> None:
    fault, tests = PROMISES[number]
    rows = [line for line in _PAGE.read_text().splitlines() if line.startswith(f"| {number} | ")]
    assert len(rows) == 1
    assert fault in rows[0]
    for test in tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
        assert f"tests/{file}" in rows[0]
        assert f"`{name}`" in rows[0]
