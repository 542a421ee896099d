"""What an export says of itself, and that its command repeats the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from relora_ds.checkpoint.export.card import CARD, RUN, Results, card_files, results_of, with_scores
from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.format.record import read_record
from relora_ds.config.load import load_run_config
from tests.golden.make_checkpoint import checkpoint
from tests.unit.checkpoint.conftest import Saved

SUMMARY = {
    "hardware": {"device": "NVIDIA H100", "world_size": 2, "cuda": None},
    "versions": {"torch": "2.13.0"},
}


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_card_tells_method_data_tokens_metrics_and_hardware() -> None:
    record = read_record(checkpoint("relora", 2))
    figures = {"train/loss": 3.25, "eval/perplexity": 21.5}
    card = card_files(record, Results(figures, SUMMARY), "bfloat16")[CARD]
    assert "relora" in str(front_matter(card)["tags"])
    for said in ('"merge_every": ', "ReLoRA", "320 tokens", "21.5000", "3.2500", "NVIDIA H100"):
        assert said in card
    for fingerprint in record.trainer.data_fingerprints:
        assert fingerprint.rpartition(":")[2][:12] in card
    assert "validation loss" not in card  # none was given
    assert "2.13.0" in card
    assert "None" not in card


def test_the_card_of_islands_that_began_with_a_model_says_so(saved: Saved) -> None:
    def change(run: dict[str, dict[str, object]]) -> None:
        run["parallel"]["islands"] = 3
        run["train"]["init_from"] = "models/llama-3"
        run["islands"] = {"every": 4}

    saved.edit("run.yaml", change)
    record = read_record(saved.path)
    card = card_files(record, Results(), "float32")[CARD]
    processes = 3 * record.trainer.dp_size * record.trainer.tp_size
    assert f"torchrun --nproc_per_node {processes} " in card
    assert '| islands | `{"every": 4' in card
    assert "trained further from `llama-3` with ReLoRA" in card


@pytest.mark.parametrize("method", ["full", "relora"])
def test_only_a_model_of_low_rank_is_tagged_so(saved: Saved, method: str) -> None:
    if method == "full":
        saved.edit("run.yaml", lambda run: run.update(method={"name": "full"}))
    card = card_files(read_record(saved.path), Results(), "float32")[CARD]
    assert ("low-rank" in str(front_matter(card)["tags"])) is (method == "relora")


@pytest.mark.parametrize("kind", ["", "sha256/64MiB:", "held out/1:"])
def test_fingerprints_tell_files_apart(saved: Saved, kind: str) -> None:
    prints = [f"{kind}{digit * 64}" for digit in "ab"]
    saved.edit("trainer.json", lambda state: state.update(data_fingerprints=prints))
    saved.edit("run.yaml", lambda run: run.update(data={"train": "data/c4", "valid": "data/v"}))
    card = card_files(read_record(saved.path), Results(), "float32")[CARD]
    assert f"`{kind}{'a' * 12}`, `{kind}{'b' * 12}`" in card


def test_figures_are_those_of_the_checkpoint_not_of_the_end(tmp_path: Path) -> None:
    lines = [
        {"step": 4, "train/loss": 4.0, "eval/loss": 3.5},
        {"step": 5, "train/loss": 3.0},
        {"step": 6, "train/loss": 2.0, "eval/loss": 1.0},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 7, "tr')
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    found = results_of(tmp_path / "checkpoints" / "step_5", 5)
    assert found == Results({"train/loss": 3.0, "eval/loss": 3.5}, SUMMARY)
    assert results_of(tmp_path / "reshaped" / "step_5", 5) == Results()


def test_credentials_are_masked_wherever_they_stand(saved: Saved) -> None:
    def change(run: dict[str, dict[str, object]]) -> None:
        run["log"]["wandb"] = {"mode": "disabled", "project": "hunter2-project"}
        run["data"]["train"] = "https://user:hunter2@example.com/train"

    saved.edit("run.yaml", change)
    files = card_files(read_record(saved.path), Results(), "float32")
    assert all("hunter2" not in text for text in files.values())


def test_the_export_holds_the_run_that_its_command_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_hf(checkpoint("relora", 2), tmp_path / "hf", torch.float32)
    monkeypatch.chdir(tmp_path / "hf")
    card = Path(CARD).read_text()
    assert f"relora-ds train {RUN}" in card
    run, record = load_run_config(RUN), read_record(checkpoint("relora", 2))
    assert run.architecture == record.architecture
    for section in ("method", "optimizer", "schedule", "train"):
        assert getattr(run.config, section) == getattr(record.config, section)


def test_scores_replace_earlier_scores_and_nothing_else() -> None:
    card = with_scores("# model\n\ntext\n", [("arc_easy", "acc", 0.25)])
    again = with_scores(card + "\nmore\n", [("piqa", "acc,none", 0.5), ("arc_easy", "acc", 0.75)])
    assert "| arc_easy | acc | 0.2500 |" in card
    assert "0.2500" not in again
    assert "| piqa | acc,none | 0.5000 |" in again
    assert again.startswith("# model\n\ntext\n")
    assert again.endswith("\nmore\n")
