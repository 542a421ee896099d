"""Layers out of other people's trees are found, given our weights, and held against ours."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.peers import authors, projection
from relora_ds.errors import ConfigError

_LAYER = """
import not_installed as unused
import torch
from torch import nn

class ReLoRaLinear(nn.Module):
    def __init__(self, n, m, r, *, lora_alpha, lora_dropout, bias, quantize):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(m, n), requires_grad=False)
        self.lora_A, self.lora_B = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)
        self.dropout, self.scale = nn.Dropout(lora_dropout), {factor} * lora_alpha / r

    def forward(self, x):
        low = self.lora_B(self.lora_A(self.dropout(x)))
        return nn.functional.linear(x, self.weight) + low * self.scale
"""


class Counter:
    """A clock by which ours takes one millisecond and theirs two."""

    device = torch.device("cpu")
    calls = 0

    def now(self) -> int:
        return time.perf_counter_ns()

    def between(self, first: int, last: int) -> float:
        self.calls += 1
        return 2.0 - self.calls % 2


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "SHAPES", ((12, 20, 4),))
    monkeypatch.setattr(authors, "_UNUSED", ("not_installed",))
    monkeypatch.delitem(sys.modules, "authors_relora", raising=False)


def _tree(directory: Path, factor: float) -> Path:
    file = directory / "clone" / "peft_pretraining" / "relora.py"
    file.parent.mkdir(parents=True)
    file.write_text(_LAYER.replace("{factor}", str(factor)))
    return directory


def _compared(trees: Path) -> list[projection.Beside]:
    return projection.compare(trees, 6, 3, torch.float32, Counter())


def test_both_take_turns(small: None, tmp_path: Path) -> None:
    rows = _compared(_tree(tmp_path, 1.0))
    assert [(row.method, row.shape, row.dropout) for row in rows] == [
        ("relora", (12, 20, 4), 0.0),
        ("relora", (12, 20, 4), 0.1),
    ]
    assert [(row.ours_ms, row.theirs_ms, row.ratio) for row in rows] == [(1.0, 2.0, 2.0)] * 2
    assert "not_installed" not in sys.modules  # who looks for the package must not find it
    assert projection.table(rows)[2] == "| relora | 12, 20, 4 | 0 | 1.0 | 2.0 | 2.000 |"


def test_what_computes_something_else_is_not_timed(small: None, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="outputs"):
        _compared(_tree(tmp_path, 1.5))


def test_no_tree(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clone the authors' repositories there"):
        authors.find_authors(tmp_path)


def test_a_missing_package_is_named(small: None, tmp_path: Path) -> None:
    trees = _tree(tmp_path, 1.0)
    file = trees / "clone" / "peft_pretraining" / "relora.py"
    file.write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ConfigError, match="pip install a_package_that_is_not_there"):
        authors.find_authors(trees)
