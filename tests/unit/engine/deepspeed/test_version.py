"""Another DeepSpeed than the tested one is pointed out."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.engine.deepspeed import version as deepspeed_version
from relora_ds.engine.deepspeed.version import SUPPORTED, version_advice

ROOT = Path(__file__).parents[4]


def test_another_deepspeed_is_named_with_the_tested_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def advice(installed: str) -> str | None:
        monkeypatch.setattr(deepspeed_version, "version", lambda package: installed)
        return version_advice()

    assert advice(SUPPORTED) is None
    assert advice(f"{SUPPORTED}+cu128") is None
    other = advice("0.20.0")
    assert other is not None
    assert "0.20.0" in other
    assert f"deepspeed=={SUPPORTED}" in other


def test_the_pinned_deepspeed_is_the_tested_one() -> None:
    assert f"deepspeed=={SUPPORTED}" in (ROOT / "requirements.txt").read_text().splitlines()
