"""Who is named where every rank stands still."""

from __future__ import annotations

from relora_ds.train.lifetime.watch import odd_one

LIMIT_S = 10.0


def test_it_does_what_nobody_else_does() -> None:
    doing = {0: "micro-batch", 1: "micro-batch", 2: "save", 3: "micro-batch"}
    # on a slow machine another one may have stood still for a moment longer
    assert odd_one(doing, {0: 10.4, 1: 9.0, 2: 10.1, 3: 9.9}, LIMIT_S) == 2


def test_one_that_only_just_went_on_is_not_meant() -> None:
    doing = {0: "micro-batch", 1: "micro-batch", 2: "save"}
    assert odd_one(doing, {0: 10.4, 1: 9.0, 2: 0.1}, LIMIT_S) == 0


def test_of_two_it_is_the_one_that_stopped_first() -> None:
    assert odd_one({0: "save", 1: "micro-batch"}, {0: 9.0, 1: 10.5}, LIMIT_S) == 1
    assert odd_one({0: "save", 1: "save"}, {0: 10.6, 1: 10.5}, LIMIT_S) == 0
