"""Tasks of lm-eval on a model, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from relora_ds.cli.main import main
from relora_ds.config.model import ModelConfig
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.hf.written import Written
from relora_ds.model.init import InitialWeights, dense_shapes
from relora_ds.train.saved_model.lm_eval import note_scores
from tests.conftest import TinyCorpus

ARCHITECTURE = ModelConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
)
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def export(tmp_path: Path, tiny_corpus: TinyCorpus) -> Path:
    """An export in a run's directory, with a card and a summary."""
    weights = InitialWeights(ARCHITECTURE, seed=1)
    drawn = ((name, weights(name, shape)) for name, shape in dense_shapes(ARCHITECTURE).items())
    target, texts = tmp_path / "run" / "hf", {"README.md": "# model\n"}
    tokenizer = tiny_corpus.tokenizer
    write_hf(target, ARCHITECTURE, drawn, tokenizer, torch.float32, texts=texts)
    (tmp_path / "run" / "summary.json").write_text('{"status": "completed", "final": {"step": 3}}')
    (tmp_path / "run" / "metrics.jsonl").touch()
    return target


def write_task(directory: Path) -> Path:
    """A task of eight questions with two answers each, which lies on the disk."""
    directory.mkdir()
    data = directory / "questions.jsonl"
    rows = [
        {"question": f"The value {n} is", "choices": [" even", " odd"], "answer": n % 2}
        for n in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "tiny_choice.yaml").write_text(TASK.format(data=data))
    return directory


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("offline")
def test_a_task_is_scored_and_noted(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_task(tmp_path / "tasks")
    arguments = ["--checkpoint", str(export), "--include-tasks", str(tasks)]
    assert main(["evaluate", *arguments, "--lm-eval", "tiny_choice"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["lm_eval"]["tiny_choice"]
    assert 0.0 <= found["acc"] <= 1.0
    assert found["acc"] * 8 == int(found["acc"] * 8)
    assert f"| tiny_choice | acc | {found['acc']:.4f} |" in (export / "README.md").read_text()
    summary = json.loads((export.parent / "summary.json").read_text())
    assert summary["lm_eval"]["tiny_choice"]["acc"] == found["acc"]
    assert summary["final"] == {"step": 3}


@pytest.mark.parametrize("edited", [False, True])
def test_scores_in_the_card_are_no_edit_of_the_user_s(export: Path, edited: bool) -> None:
    if edited:
        (export / "README.md").write_bytes(b"# mine \xff\n")
    for value in (0.25, 0.5):
        note_scores(export, {"a": {"acc": value}})
    card = (export / "README.md").read_bytes()
    assert b"| a | acc | 0.5000 |" in card
    assert card.startswith(b"# mine \xff\n" if edited else b"# model\n")
    assert Written.recorded_in(export).edited_in(export) == ["README.md"] * edited


@pytest.mark.usefixtures("offline")
def test_an_unknown_task_is_one_sentence(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert main(["evaluate", "--checkpoint", str(export), "--lm-eval", "no_such_task"]) == 2
    assert "lm-eval has no such task" in capsys.readouterr().err.splitlines()[-1]


def test_several_sets_are_scored_by_one_model(
    export: Path, tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{tiny_corpus.valid}{suffix}", tmp_path / f"other{suffix}")
    arguments = ["evaluate", "--checkpoint", str(export), "--seq-length", "64", "--data"]
    sets = [str(tiny_corpus.valid), str(tmp_path / "other")]
    assert main([*arguments, *sets]) == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each.pop("data") for each in both] == sets
    assert main([*arguments, sets[0]]) == 0
    assert json.loads(capsys.readouterr().out) == both[0] == both[1]


def test_nothing_to_score_on_is_wrong_usage(export: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--checkpoint", str(export)])
    assert caught.value.code == 2
