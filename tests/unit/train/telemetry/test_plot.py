"""The loss curve: a picture from whatever a run left behind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relora_ds.errors import ConfigError
from relora_ds.train.telemetry.plot import _smooth, _with_gaps, plot_run

ROOT = Path(__file__).resolve().parents[4]
PNG = b"\x89PNG\r\n\x1a\n"
Record = dict[str, Any]


def _write(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _curve(steps: range) -> list[Record]:
    return [{"step": s, "train/loss": 3 + 7 * math.exp(-s / 150), "train/lr": 1e-3} for s in steps]


def _with_events(records: list[Record]) -> list[Record]:
    for record in records[::3]:
        record |= {"method/event": "switch"}
    records[5] |= {"method/event": "transition"}
    records[-1] |= {"eval/loss": 3.1, "eval/perplexity": 22.2}
    return records


CASES: dict[str, list[Record]] = {
    "one_point": _curve(range(1, 2)),
    "two_points": _curve(range(1, 3)),
    "no_eval": _curve(range(10, 1000, 10)),
    "words_for_numbers": [*_curve(range(1, 4)), {"step": 5, "train/loss": "b", "eval/loss": "c"}],
    "largest_numbers": [{"step": 1, "train/loss": 3e38}, {"step": 2, "train/loss": -3e38}],
    "only_eval": [{"step": 0, "eval/loss": 10.4}],
    "constant": [{"step": s, "train/loss": 2.0, "train/lr": 0.0} for s in range(30)],
    "nulls": [{"step": s, "train/loss": None if s > 20 else 3.0 - s / 20} for s in range(40)],
    "missing_steps": _curve(range(10, 300, 10)) + _curve(range(700, 1000, 10)),
    "many_events": _with_events(_curve(range(10, 3000, 10))),
    "no_learning_rate": [{"step": s, "train/loss": 1.0 / s} for s in range(1, 30)],
}


@pytest.mark.parametrize("case", CASES)
def test_a_picture_comes_out_without_a_warning(tmp_path: Path, case: str) -> None:
    metrics = _write(tmp_path / "metrics.jsonl", CASES[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = plot_run(metrics, tmp_path / "plots" / "loss.png")
    content = output.read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 10_000


def test_the_legend_counts_events_and_the_title_has_the_last_evaluation(tmp_path: Path) -> None:
    metrics = _write(tmp_path / "metrics.jsonl", CASES["many_events"])
    svg = plot_run(metrics, tmp_path / "loss.svg").read_text()
    for text in ("switch (100)", "transition", "train loss", "eval loss 3.100, perplexity 22.20"):
        assert text in svg


def test_lines_break_where_reports_are_missing() -> None:
    steps = np.array([10.0, 20, 30, 40, 200, 210])
    broken_steps, broken = _with_gaps(steps, np.ones(6))
    assert broken_steps.tolist() == [10, 20, 30, 40, 40, 200, 210]
    assert np.isnan(broken).tolist() == [False] * 4 + [True] + [False] * 2


def test_smoothing_is_centred_and_leaves_out_what_is_not_known() -> None:
    ramp = np.arange(800.0)
    assert np.allclose(_smooth(ramp)[10:-10], ramp[10:-10])
    ramp[400] = np.nan
    smooth = _smooth(ramp)
    assert np.isnan(smooth[400])
    assert np.isfinite(np.delete(smooth, 400)).all()
    assert smooth[395] == pytest.approx(np.nanmean(ramp[385:406]))


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"step": 1, "train/loss": None}]])
def test_a_run_without_a_loss_is_an_error(tmp_path: Path, records: list[Record]) -> None:
    metrics = _write(tmp_path / "metrics.jsonl", records)
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot_run(metrics, tmp_path / "loss.png")


def test_a_format_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    metrics = _write(tmp_path / "metrics.jsonl", CASES["one_point"])
    with pytest.raises(ConfigError, match=r"png"):
        plot_run(metrics, tmp_path / "loss.nonsense")


def _run_tool(*arguments: Path | str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "plot_run.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_tool_plots_a_run_from_any_directory(tmp_path: Path) -> None:
    _write(tmp_path / "metrics.jsonl", CASES["no_eval"])
    done = _run_tool(".", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(PNG)


def test_the_tool_reports_a_missing_run_in_one_line(tmp_path: Path) -> None:
    failed = _run_tool(tmp_path / "nowhere", cwd=tmp_path)
    assert failed.returncode == ConfigError.exit_code
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
