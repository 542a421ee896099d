"""Fine-tuning learns a few sentences by heart, from a checkpoint and from an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.cli.main import main
from relora_ds.data.tokenizer import open_tokenizer
from relora_ds.train.saved_model.glue.classifier import Encoding, classifier, opened
from relora_ds.train.saved_model.glue.examples import Example
from relora_ds.train.saved_model.glue.tasks import TASKS
from tests.golden.make_checkpoint import checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

GOOD = ("warm and clever", "great fun", "the best of it all", "bright, alive")
POOR = ("dull and long", "a bad joke", "nothing works", "cold and flat")
LETTERS = "abcdefghijklmnopqrstuvwxyz ,."


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of a ReLoRA run between two merges, with a tokenizer of single letters."""
    step = tmp_path / "run" / "checkpoints" / "step_5"
    shutil.copytree(checkpoint("relora", 2), step)
    symbols = ["<unk>", "<s>", "</s>", *LETTERS]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.save(str(step / "tokenizer.json"))
    write_manifest(step)
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / "summary.json").write_text('{"final": {"step": 5}}')
    return step


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks whose sentences are to be learnt by heart."""
    rows = [(text, 1) for text in GOOD] + [(text, 0) for text in POOR]
    sst2, stsb = tmp_path / "glue" / "SST-2", tmp_path / "glue" / "STS-B"
    similar = [("a", "aa", 5), ("aaa", "a", 4.5), ("z", "zzz", 0), ("zz", "z", 0.5)]
    tables = {
        sst2: ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)],
        stsb: ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{s}" for a, b, s in similar)],
    }
    for folder, lines in tables.items():
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "glue"


def arguments(model: Path, data: Path, *more: str) -> list[str]:
    """Few and quick epochs on tiny batches."""
    quick = ["--lr", "2e-2", "--batch-size", "4", "--epochs", "25", "--seeds", "1", "2"]
    return ["finetune", "--checkpoint", str(model), "--data", str(data), *quick, *more]


def test_all_weights_learn_the_sentences(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    assert main(arguments(model, data, "--task", "sst2", "--output", str(kept))) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == {"mean": 1.0, "std": 0.0, "values": [1.0, 1.0]}
    assert found["settings"]["max_length"] == 32, "the model reads no more"
    summary = json.loads((model.parents[1] / "summary.json").read_text())
    assert summary == {"final": {"step": 5}, "glue": {"sst2/full": found}}

    load = transformers.AutoModelForSequenceClassification.from_pretrained
    again = load(kept / "seed_2").eval()
    assert again.config.id2label == {0: "negative", 1: "positive"}
    assert open_tokenizer(kept / "seed_2").encode(GOOD[0]) == open_tokenizer(model).encode(GOOD[0])
    encoding = Encoding(open_tokenizer(model), 32, None)
    rows = encoding.encode([Example((text,), 0) for text in GOOD + POOR])
    with torch.no_grad():
        together = again(**encoding.batch(rows, torch.device("cpu"))).logits
        for row, logits in zip(rows, together, strict=True):
            alone = again(**encoding.batch([row], torch.device("cpu"))).logits[0]
            torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)
    assert together.argmax(-1).tolist() == [1] * 4 + [0] * 4


def test_an_export_learns_what_its_checkpoint_does(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_hf(model, tmp_path / "hf", torch.float32)
    found = []
    for source in (model, tmp_path / "hf"):
        more = ("--task", "stsb", "--seeds", "3")
        assert main(arguments(source, data, *more)) == 0
        shown = capsys.readouterr()
        epochs = [line.split(" (")[0] for line in shown.err.splitlines()]
        found.append((json.loads(shown.out), epochs))
    assert found[0] == found[1], "scores, and losses of every epoch"
    assert found[0][0]["pearson"]["mean"] > 0.9


@pytest.mark.parametrize("trained", ["lora", "adapters"])
def test_factors_learn_the_sentences(
    trained: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    more = ("--task", "sst2", "--train", trained, "--output", str(tmp_path / "kept"))
    assert main(arguments(model, data, *more, "--seeds", "1", "--epochs", "40")) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["values"] == [1.0]
    config = peft.LoraConfig.from_pretrained(tmp_path / "kept" / "seed_1")
    assert config.r == (8 if trained == "lora" else 2)


@pytest.mark.parametrize("trained", ["lora", "adapters"])
def test_factors_begin_with_the_function_of_the_checkpoint(trained: str, model: Path) -> None:
    pytest.importorskip("peft")
    heads, ids = [], torch.arange(24).view(2, 12)
    for kind in ("full", trained):
        with opened(model, kind) as source:  # pyright: ignore[reportArgumentType]
            made = classifier(source, TASKS["rte"], kind, 2, 4.0, seed=1).eval()  # pyright: ignore[reportArgumentType]
        made.config.pad_token_id = 60
        with torch.no_grad():
            heads.append(made(input_ids=ids, output_hidden_states=True).hidden_states[-1])
        taking = {name for name, weight in made.named_parameters() if weight.requires_grad}
        assert any("score" in name for name in taking)
        if kind != "full":
            assert all("lora_" in name or "score" in name for name in taking)
    torch.testing.assert_close(*heads, atol=1e-5, rtol=1e-5)


def test_an_export_has_no_factors_to_go_on_with(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_hf(model, tmp_path / "hf", torch.float32)
    code = main(arguments(tmp_path / "hf", data, "--task", "sst2", "--train", "adapters"))
    assert code == 4
    assert "holds no adapters: name a checkpoint" in capsys.readouterr().err


def test_a_taken_folder_and_a_diverging_rate_are_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept" / "seed_2").mkdir(parents=True)
    (tmp_path / "kept" / "seed_2" / "notes.txt").touch()
    more = ("--task", "sst2", "--output", str(tmp_path / "kept"))
    assert main(arguments(model, data, *more)) == 2
    assert "exists and is not an earlier export" in capsys.readouterr().err
    assert main(arguments(model, data, "--task", "stsb", "--lr", "1e30")) == 5
    assert "lower --lr, which is 1e+30" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [((3, 4), (3, 4)), ((20, 3), (7, 3)), ((3, 20), (3, 7)), ((20, 20), (5, 5)), ((9,), (9,))],
)
def test_the_longer_sentence_is_cut_first(
    lengths: tuple[int, ...], kept: tuple[int, ...], model: Path
) -> None:
    tokenizer = open_tokenizer(model)
    encoding = Encoding(tokenizer, 12, None)
    texts = tuple("ab"[number] * length for number, length in enumerate(lengths))
    (ids,) = encoding.encode([Example(texts, 0)])
    end = tokenizer.eos_id
    parts = [[*tokenizer.encode("ab"[number] * length), end] for number, length in enumerate(kept)]
    assert ids == [i for part in parts for i in part]
    assert encoding.padding != end


@pytest.mark.parametrize(("pad", "end", "padding"), [(3, 2, 3), (2, 2, 0), (None, 2, 0), (0, 0, 1)])
def test_what_fills_rows_ends_no_sentence(pad: int | None, end: int, padding: int) -> None:
    tokenizer: Any = SimpleNamespace(eos_id=end)
    assert Encoding(tokenizer, 12, pad).padding == padding
