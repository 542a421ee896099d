"""Nothing that NCCL would refuse reaches a group of the device."""

from __future__ import annotations

import pytest

from relora_ds.methods.registry import METHODS
from tests.distributed.cases import nccl_rules
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


def test_the_rules_refuse() -> None:
    said = run_ranks(nccl_rules.refusals, 2)
    assert {name: words.rpartition(": ")[2] for name, words in said.items()} == {
        "type": "NCCL does not know the type",
        "strides": "it is not contiguous",
        "host": "it is in the host's memory",
        "shares": "3 elements are not 2 times 2",
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_run_keeps_the_rules(method: str) -> None:
    checked = run_ranks(nccl_rules.train, 2, method=method)
    assert checked.keys() == nccl_rules.CUTS.keys()
    assert all(checked.values())
