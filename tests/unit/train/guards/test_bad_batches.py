"""The file of batches that a run did not believe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from relora_ds.data.batches import TrainingBatches
from relora_ds.train.guards.bad_batches import BadBatches


class Data:
    """Two ranks with one sequence each; a step reads those of its own number."""

    def name(self, file: int) -> str:
        return f"corpus_{file}"

    def samples(self, step: int) -> list[np.ndarray]:
        return [np.array([[0, 10 * step]]), np.array([[1, 10 * step + 1]])]


def batches(path: Path, *, is_main: bool = True) -> BadBatches:
    return BadBatches(path, cast(TrainingBatches, Data()), is_main)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "bad_batches.jsonl"


def test_the_sequences_of_every_rank_are_named(path: Path) -> None:
    batches(path).note(4, "skip", "because")
    assert lines(path) == [
        {
            "step": 5,
            "action": "skip",
            "reason": "because",
            "ranks": [
                {"dp_rank": 0, "sequences": [["corpus_0", 40]]},
                {"dp_rank": 1, "sequences": [["corpus_1", 41]]},
            ],
        }
    ]


def test_a_batch_that_a_resumed_run_meets_again_is_there_once(path: Path) -> None:
    first = batches(path)
    first.note(4, "stop", "as it was")
    first.note(6, "skip", "another")
    again = batches(path)
    again.note(4, "skip", "as it is")
    again.note(6, "skip", "another")
    found = [(line["step"], line["action"], line["reason"]) for line in lines(path)]
    assert sorted(found) == [(5, "skip", "as it is"), (7, "skip", "another")]


@pytest.mark.parametrize("torn", ['{"step": 3, "act', "[1]", "null", "\x00\x00"])
def test_what_is_no_line_is_left_out(path: Path, torn: str) -> None:
    batches(path).note(1, "skip", "whole")
    with path.open("a") as file:
        file.write(torn)
    batches(path).note(4, "skip", "whole")
    assert [line["step"] for line in lines(path)] == [2, 5]


def test_one_process_writes(path: Path) -> None:
    batches(path, is_main=False).note(4, "skip", "because")
    assert not path.exists()


def test_a_file_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("in the way")
    batches(tmp_path / "logs" / "bad_batches.jsonl").note(4, "skip", "because")
    assert "cannot write" in caplog.text
