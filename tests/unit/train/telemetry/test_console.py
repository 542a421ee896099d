"""Plain lines, the live bar, and the estimate of the time that remains."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import rich.console

from relora_ds.train.telemetry.sinks.console import (
    BarConsole,
    PlainConsole,
    RemainingTime,
    build_console,
    format_count,
    format_duration,
)


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


REPORT = {
    "train/loss": 3.45678,
    "train/lr": 9.5e-4,
    "throughput/tokens_per_second": 12345.6,
    "throughput/mfu": None,
}


def test_plain_lines_show_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    console = build_console(10_000, 1_000, is_tty=False, clock=clock)
    assert isinstance(console, PlainConsole)
    clock.now += 60
    console.log(1_200, REPORT)
    console.log(1_200, {"method/function_drift": 1e-7})
    console.log(
        1_200, REPORT | {"throughput/mfu": 0.412, "eval/loss": 3.2, "eval/perplexity": 24.5}
    )
    console.close()
    assert caplog.messages == [
        "step 1,200/10,000 | loss 3.4568 | lr 9.50e-04 | 12.3k tokens/s | eta 44m00s",
        "step 1,200/10,000 | loss 3.4568 | eval loss 3.2000 | perplexity 24.50 | lr 9.50e-04"
        " | 12.3k tokens/s | mfu 41.2% | eta 44m00s",
    ]


def test_the_bar_shows_progress_and_lets_log_lines_pass(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=120, color_system=None)
    clock = FakeClock()
    before = sys.stderr
    bar = BarConsole(100, 10, RemainingTime(100, 10, clock), terminal)
    clock.now += 9
    bar.log(20, REPORT)
    sys.stderr.write("a line from elsewhere\n")
    bar.log(20, {"eval/loss": 3.2, "eval/perplexity": 24.5})
    bar.close("failed")
    assert sys.stderr is before
    shown = screen.getvalue()
    assert "a line from elsewhere\n" in shown
    for text in ("10/100", "20/100", "20%", "loss 3.4568", "lr 9.50e-04", "12.3k", "eta 1m12s"):
        assert text in shown
    assert caplog.messages == ["step 20 | eval loss 3.2000 | perplexity 24.50"]


def test_the_bar_is_chosen_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = build_console(10, is_tty=True)
    console.close()
    assert isinstance(console, BarConsole)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert isinstance(build_console(10), PlainConsole)


def test_the_remaining_time_follows_the_pace_and_is_never_negative() -> None:
    clock = FakeClock()
    eta = RemainingTime(1_000, 0, clock)
    remaining = eta.update(0)
    assert remaining is None
    for step in range(1, 200):
        clock.now += 1.0
        remaining = eta.update(step)
    assert remaining == pytest.approx(801)
    for step in range(200, 240):
        clock.now += 0.5
        remaining = eta.update(step)
    assert remaining == pytest.approx(761 * 0.5), "the pace before the window is forgotten"
    assert eta.update(1_100) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (7_620, "2h07m"),
        (93_600, "1d02h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950.4, "950"),
        (999.7, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (1.204e6, "1.20M"),
        (2.5e9, "2.50G"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text
