"""Numbers on command lines: each is within its range, or named with its rule."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from relora_ds.cli.main import main
from relora_ds.cli.numbers import Count, Real, amount


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Count(), "1", 1),
        (Count(0), "0", 0),
        (Count(0, 3), "3", 3),
        (Real(), "1e-30", 1e-30),
        (Real(or_zero=True), "0", 0.0),
        (Real(1, or_most=True), "1", 1.0),
        (Real(1), "0.999", 0.999),
        (amount, "80GB", 80e9),
        (amount, "200kB", 200e3),
        (amount, ".5G", 5e8),
        (amount, "1.5e3 MB", 1.5e9),
        (amount, "100Mbit", 12.5e6),
        (amount, "989.4T", 989.4e12),
    ],
)
def test_what_is_in_range_is_taken(kind: Callable[[str], float], text: str, value: float) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (Count(), "0", "is 0, but must be at least 1"),
        (Count(), "-8", "is -8, but must be at least 1"),
        (Count(), "1e3", "is '1e3', but must be a whole number"),
        (Count(0, 3), "4", "is 4, but must be 0 to 3"),
        (Real(), "0", "is 0, but must be a finite number, above 0"),
        (Real(), "nan", "is nan, but must be a finite number, above 0"),
        (Real(or_zero=True), "inf", "is inf, but must be a finite number, 0 or more"),
        (Real(or_zero=True), "-1e-9", "is -1e-9, but must be a finite number, 0 or more"),
        (Real(1), "1", "is 1, but must be above 0, and less than 1"),
        (Real(1, or_most=True), "1.01", "is 1.01, but must be above 0, and at most 1"),
        (Real(), "half", "is 'half', but must be a number"),
        (amount, "0", "'0' is no amount"),
        (amount, "1e999", "'1e999' is no amount"),
        (amount, "1e300TB", "'1e300TB' is no amount"),
        (amount, "1.2.3GB", "'1.2.3GB' is no amount"),
        (amount, ".", "'.' is no amount"),
        (amount, "80 Gig", "'80 Gig' is no amount"),
    ],
)
def test_what_is_not_is_named_with_its_rule(
    kind: Callable[[str], float], text: str, said: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan run.yaml --gpus 0", "argument --gpus: is 0, but must be at least 1"),
        ("plan run.yaml --gpus 8 --gpus-per-node 0", "argument --gpus-per-node: is 0"),
        ("plan run.yaml --gpus 8 --efficiency 0", "argument --efficiency: is 0"),
        ("plan run.yaml --gpus 8 --latency nan", "argument --latency: is nan"),
        ("plan run.yaml --gpus 8 --island-latency -1", "argument --island-latency: is -1"),
        ("evaluate --checkpoint c --data d --seq-length 0", "argument --seq-length: is 0"),
        ("evaluate --checkpoint c --data d --batch-size 0", "argument --batch-size: is 0"),
        ("evaluate --checkpoint c --data d --ranks 0", "argument --ranks: is 0"),
        ("evaluate --checkpoint c --data d --valid-share 1", "argument --valid-share: is 1"),
        ("evaluate --checkpoint c --lm-eval t --limit 0", "argument --limit: is 0"),
        ("generate --checkpoint c --max-tokens 0", "argument --max-tokens: is 0"),
        ("generate --checkpoint c --temperature inf", "argument --temperature: is inf"),
        ("generate --checkpoint c --top-p 0", "argument --top-p: is 0"),
        ("export --checkpoint c --output o --max-shard-size 0", "'0' is no amount"),
        ("prepare-data --input i --tokenizer t --output o --workers 0", "argument --workers: is 0"),
        ("train-tokenizer --input i --output o --vocab-size -1", "argument --vocab-size: is -1"),
        ("reshape --checkpoint c --output o --zero-stage 4", "argument --zero-stage: is 4"),
        ("reshape --checkpoint c --output o --tensor 0", "argument --tensor: is 0"),
        ("convert-flags --processes 0", "argument --processes: is 0"),
    ],
)
def test_a_verb_refuses_a_number_before_it_does_anything(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(line.split())
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err
