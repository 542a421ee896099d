"""metrics.jsonl: strict JSON, at once on disk, and one clean series over any resume."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path
from typing import Any

import pytest

from relora_ds.errors import ConfigError, ReloraError
from relora_ds.train.telemetry.atomic import write_atomically
from relora_ds.train.telemetry.sinks.base import MetricsFile, read_metrics


def _log_steps(path: Path, steps: range, resume_step: int = 0, offset: float = 0.0) -> None:
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.log(step, {"train/loss": step + offset})
    file.close()


def _fail_on_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_lines_start_with_the_step_and_are_visible_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    file.log(10, {"tokens": 5120, "train/loss": 3.5, "method/event": "merge", "unknown": None})
    assert path.read_text().startswith('{"step": 10, "tokens": 5120')
    assert read_metrics(path) == [
        {"step": 10, "tokens": 5120, "train/loss": 3.5, "method/event": "merge", "unknown": None}
    ]
    file.close()
    file.close()


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log(1, {"nan": math.nan, "high": math.inf, "low": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=_fail_on_constant)
    assert record == {"step": 1, "nan": None, "high": None, "low": None}


def test_resume_drops_later_steps_and_keeps_earlier_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _log_steps(path, range(1, 9))
    kept = path.read_bytes().splitlines(keepends=True)[:5]
    _log_steps(path, range(6, 11), resume_step=5, offset=0.5)
    assert path.read_bytes().splitlines(keepends=True)[:5] == kept
    losses = [record["train/loss"] for record in read_metrics(path)]
    assert losses == [1, 2, 3, 4, 5, 6.5, 7.5, 8.5, 9.5, 10.5]


@pytest.mark.parametrize("torn", [b'{"step": 6, "train/lo', b'{"step": 6', b"\xff\xfe", b"[1"])
def test_resume_tolerates_a_torn_last_line(
    tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    _log_steps(path, range(1, 6))
    with path.open("ab") as file:
        file.write(torn)
    _log_steps(path, range(6, 8), resume_step=5)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert not caplog.records, "a torn last line is expected after a kill"


def test_an_altered_line_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"no": "step"}\n{"step": 2}\n')
    _log_steps(path, range(3, 4), resume_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert [f"{path}:2" in caplog.text, f"{path}:3" in caplog.text] == [True, True]


@pytest.mark.parametrize(
    "altered",
    [
        '{"step": true}',
        '{"step": 1.0}',
        '{"step": -1}',
        f'{{"step": {10**30}}}',
        '{"step": 2, "train/loss": {"a": 1}}',
        '{"step": 2, "train/loss": [1.5]}',
        f'{{"step": 2, "tokens": {10**400}}}',
        "[" * 200_000,
        '{"a":' * 200_000,
    ],
)
def test_a_line_that_no_run_writes_is_skipped(
    tmp_path: Path, altered: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": 1}}\n{altered}\n{{"step": 3, "a": "b"}}\n')
    assert read_metrics(path) == [{"step": 1, "a": 1}, {"step": 3, "a": "b"}]
    assert f"{path}:2 is not a metrics line" in caplog.text


def test_numbers_that_are_not_finite_are_read_as_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": NaN, "b": -Infinity, "c": 1e999}\n')
    assert read_metrics(path) == [{"step": 1, "a": None, "b": None, "c": None}]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _log_steps(path, range(0, 4))
    _log_steps(path, range(0, 2))
    assert [record["step"] for record in read_metrics(path)] == [0, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_output_directory_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output_dir"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file._file.close()
    file._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(ReloraError, match=r"metrics\.jsonl: No space left"):
        file.log(1, {"train/loss": 1.0})
    file.close()


def test_a_failed_atomic_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, b"before")

    def fail(source: object, target: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


_DRAFTS = ("summary [1].json.4711", "summary [1].json.4712", "summary 1.json.4713")
_DRAFTS += ("summary [1].json.backup",)


def test_what_a_killed_writer_left_goes_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "summary [1].json"
    dead, alive, foreign, mine = (tmp_path / f".{name}.tmp" for name in _DRAFTS)
    for draft in (dead, alive, foreign, mine):
        draft.write_bytes(b"half")
    with alive.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomically(path, b"whole")
        assert set(tmp_path.iterdir()) == {path, alive, foreign, mine}


def test_a_file_that_was_removed_does_not_take_lines_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log(1, {"train/loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ReloraError, match="was removed or replaced"):
        file.log(2, {"train/loss": 1.0})
    with pytest.raises(ReloraError, match="was removed or replaced"):
        file.close()
    file.close()


def test_what_followed_the_report_of_the_resumed_step_happens_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log(3, {"tokens": 30, "train/loss": 1.0})
    file.log(3, {"method/event": "transition"})
    file.log(4, {"tokens": 40, "train/loss": 0.5})
    file.close()
    MetricsFile(path, resume_step=3).close()
    assert read_metrics(path) == [{"step": 3, "tokens": 30, "train/loss": 1.0}]


def test_a_rewound_file_goes_on_from_an_earlier_step(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.log(step, {"tokens": step, "train/loss": float(step)})
    file.rewind(1)
    file.log(2, {"tokens": 2, "train/loss": 9.0})
    file.close()
    assert [line["train/loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 9.0]
