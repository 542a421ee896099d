"""What a start says and refuses before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.config.load import load_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import DataConfig
from relora_ds.data.prepare import prepare
from relora_ds.data.source import Corpus, open_corpus
from relora_ds.data.tokenizer import train_tokenizer
from relora_ds.engine.accelerator import describe_arithmetic
from relora_ds.errors import CheckpointError, ConfigError, DataError
from relora_ds.train.checks import (
    check_start,
    doubt_about_the_resume,
    doubts_about_the_export,
)
from tests.golden.make_checkpoint import checkpoint

ROOT = Path(__file__).parents[3]
Make = Callable[..., Corpus]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Builds a corpus with a tokenizer of LLaMA's special ids (1, 2, 3), named or not."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {n} of a text" for n in range(300)))
    train_tokenizer([tmp_path / "text.txt"], 300, tmp_path / "tokenizer.model")
    prepare([tmp_path / "text.txt"], tmp_path / "tokenizer.model", tmp_path / "tokens")

    def corpus(*, named: bool = True) -> Corpus:
        tokenizer = str(tmp_path / "tokenizer.model") if named else None
        return open_corpus(DataConfig(train=str(tmp_path / "tokens"), tokenizer=tokenizer))

    return corpus


def architecture(**changes: object) -> ModelConfig:
    widths = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    return ModelConfig.model_validate({**widths, **counts, **changes})


def test_ids_that_agree_need_no_word(make: Make) -> None:
    assert list(doubts_about_the_export(architecture(), make())) == []
    several = architecture(eos_token_id=[2, 7])
    assert list(doubts_about_the_export(several, make())) == []


def test_other_ids_than_the_tokenizer_s_are_named(make: Make) -> None:
    bos, eos = doubts_about_the_export(architecture(bos_token_id=0, eos_token_id=1), make())
    assert "says bos_token_id 0, but" in bos
    assert "says eos_token_id 1, but" in eos
    assert eos.endswith("says 2: the export says what the tokenizer does")


def test_a_corpus_without_a_tokenizer_says_what_ends_its_documents(make: Make) -> None:
    without = make(named=False)
    (absent,) = doubts_about_the_export(architecture(), without)
    assert absent == "data.tokenizer is not set: the export comes without a tokenizer"
    _, eos = doubts_about_the_export(architecture(eos_token_id=5), without)
    assert "documents of the data end with 2" in eos
    assert "set eos_token_id to 2" in eos


def test_token_files_made_elsewhere_are_accepted_with_a_word(make: Make, tmp_path: Path) -> None:
    make()
    (tmp_path / "tokens.json").unlink()
    missing, _ = doubts_about_the_export(architecture(), make(named=False))
    assert missing.startswith(f"{tmp_path}/tokens.json is missing")


def test_other_arithmetic_than_the_checkpoint_s_is_named() -> None:
    cpu = torch.device("cpu")
    saved = SavedRun(checkpoint("relora", 2))
    assert doubt_about_the_resume(saved, cpu) is None, "an earlier version did not say"

    def written_by(what: str) -> SavedRun:
        trainer = saved.record.trainer.model_copy(update={"arithmetic": what})
        return SavedRun(saved.checkpoint, replace(saved.record, trainer=trainer))

    here = describe_arithmetic(cpu)
    assert doubt_about_the_resume(written_by(here), cpu) is None
    there = here.replace(torch.__version__, "1.0")
    doubt = doubt_about_the_resume(written_by(there), cpu)
    assert doubt is not None
    assert f"was computed by {there}, and goes on by {here}" in doubt
    assert doubt.endswith("not bit for bit")


@pytest.fixture
def described(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of the quickstart's run that a start would take."""
    make()
    monkeypatch.chdir(ROOT)
    files = {key: f"{tmp_path}/tokens" for key in ("train", "valid")}
    data = f"{{train: {files['train']}, valid: {files['valid']}}}"
    return [f"data={data}", f"output_dir={tmp_path}/run", "train.seq_length=64"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("data.train=nope", DataError, "nope"),
        ("data.tokenizer=nope", DataError, "nope"),
        ("train.init_from=nope", CheckpointError, "nope"),
        ("checkpoint.resume=true", CheckpointError, "holds no checkpoint"),
        ("checkpoint.resume=nope", CheckpointError, "nope"),
        ("output_dir=LICENSE/x", ConfigError, "LICENSE is not a directory"),
    ],
)
def test_a_dry_run_refuses_what_a_start_would(
    described: list[str], change: str, error: type[Exception], words: str
) -> None:
    right = load_run_config("configs/run/quickstart.yaml", described)
    check_start(right.config, right.architecture)
    assert not Path(right.config.output_dir).exists(), "nothing is changed"
    wrong = load_run_config("configs/run/quickstart.yaml", [*described, change])
    with pytest.raises(error, match=words):
        check_start(wrong.config, wrong.architecture)


def test_a_dry_run_on_builtin_data_looks_at_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    output = f"output_dir={tmp_path}/run"
    run = load_run_config("configs/run/quickstart.yaml", [output, "train.init_from=nope"])
    with pytest.raises(CheckpointError, match="nope"):
        check_start(run.config, run.architecture)
