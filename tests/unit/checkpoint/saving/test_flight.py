"""What is told of a save that has ended."""

from __future__ import annotations

from pathlib import Path

from relora_ds.checkpoint.saving.flight import SaveResult


def test_a_save_in_figures_and_in_words() -> None:
    result = SaveResult(7, Path("run/step_7"), None, 1_400_000_000, 61.5, 0.25)
    assert result.figures() == {
        "checkpoint/step": 7,
        "checkpoint/bytes": 1_400_000_000,
        "checkpoint/seconds": 61.5,
        "checkpoint/stall_seconds": 0.25,
    }
    assert str(result) == "saved to run/step_7 (1.4 GB in 61.50 s, training waited 0.25 s)"
