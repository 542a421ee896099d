"""Every fault that something is promised about has its tests, and the page names them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.promises import PROMISES
from tests.faults.trials import TRIALS
from tests.harness.ranks import ROOT, rank_environment

_PAGE = ROOT / "docs" / "reliability.md"
_ROWS = {str(number): row for number, row in PROMISES.items()} | TRIALS


def test_all_are_there() -> None:
    assert list(PROMISES) == list(range(1, 40))
    assert list(TRIALS) == [f"F{number}" for number in range(1, 21)]


@pytest.mark.parametrize("number", _ROWS)
def test_the_tests_of_a_promise_are_on_the_page(number: str) -> None:
    fault, tests = _ROWS[number]
    rows = [line for line in _PAGE.read_text().splitlines() if line.startswith(f"| {number} | ")]
    assert len(rows) == 1
    assert fault in rows[0]
    for test in tests:
        file, _, name = test.partition("::")
        assert f"tests/{file} `{name}`" in rows[0]


@pytest.mark.distributed
def test_the_tests_of_all_promises_are_collected() -> None:
    """Under some marker: those that are slow, or need hosts, are run by their commands."""
    wanted = {f"tests/{test}" for _, tests in _ROWS.values() for test in tests}
    files = sorted({test.partition("::")[0] for test in wanted})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    done = subprocess.run(
        command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    collected = {line.partition("[")[0] for line in done.stdout.splitlines()}
    assert wanted - collected == set()
