"""`tools/plan.py --json` prints, byte for byte, what programs have learnt to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.cli.plan import main

ROOT = Path(__file__).parents[3]
RUNS = {
    "quickstart_tensor2": (
        "configs/run/quickstart.yaml --gpus 8 --gpus-per-node 4 "
        "train.global_batch_size=64 parallel.tensor=2"
    ),
    "llama_60m_sltrain_tensor2": (
        "configs/run/llama_60m_sltrain.yaml --gpus 16 train.global_batch_size=2048 "
        "parallel.tensor=2 train.activation_checkpointing=true"
    ),
}


@pytest.mark.parametrize(
    "name",
    ["quickstart_tensor2", pytest.param("llama_60m_sltrain_tensor2", marks=pytest.mark.slow)],
)
def test_the_json_is_the_recorded_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*RUNS[name].split(), "--json"]) == 0
    recorded = ROOT / "tests" / "golden" / f"plan_{name}.json"
    assert capsys.readouterr().out == recorded.read_text()
