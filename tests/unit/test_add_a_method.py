"""The worked example of docs/add_a_method.md runs as it is printed."""

from __future__ import annotations
import __future__

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_method.md"


def _blocks(page: str) -> Iterator[tuple[int, str]]:
    """First line and code of each Python block."""
    for found in re.finditer(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield page.count("\n", 0, found.start(1)), found[1]


def test_the_code_of_the_page_runs_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = list(_blocks(PAGE.read_text()))
    assert len(blocks) == PAGE.read_text().count("```python")
    # annotations of its classes are looked up in the module that defines them
    module = ModuleType("add_a_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    flags = __future__.annotations.compiler_flag
    for lines_before, code in blocks:
        # a traceback shows the line of the page
        padded = "\n" * lines_before + code
        exec(compile(padded, str(PAGE), "exec", flags, dont_inherit=True), module.__dict__)
