"""What a start says and refuses before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from relora_ds.checkpoint.export.dense import ResizedVocabulary
from relora_ds.checkpoint.saved_run import SavedRun
from relora_ds.cli.main import main
from relora_ds.config.load import load_run_config
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import DataConfig
from relora_ds.data.prepare import prepare
from relora_ds.data.source import Corpus, open_corpus
from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.data.tokenizer import train_tokenizer
from relora_ds.engine.accelerator import describe_arithmetic
from relora_ds.errors import CheckpointError, ConfigError, DataError
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.init import InitialWeights, dense_shapes
from relora_ds.train.checks import (
    check_start,
    doubt_about_the_resume,
    doubt_about_the_start,
    doubts_about_the_export,
    initial_model,
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
    doubt = doubt_about_the_resume(written_by(here), cpu, padded=True)
    assert doubt is not None
    assert f"goes on by {here} and padded MLPs" in doubt


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A model with 40 rows more than the tokenizer has ids."""
    config = architecture(vocab_size=340, num_key_value_heads=2)
    weights = InitialWeights(config, seed=1)
    named = ((name, weights(name, shape)) for name, shape in dense_shapes(config).items())
    write_hf(tmp_path / "grown", config, named, None, torch.float32)
    return tmp_path / "grown"


def begun_from(directory: Path) -> RunConfig:
    sizes = {"steps": 1, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 1}
    run = {"output_dir": "x", "model": "m", "deepspeed": "z", "method": {"name": "full"}}
    return RunConfig.model_validate({**run, "train": {**sizes, "init_from": str(directory)}})


@pytest.mark.parametrize(("rows", "said"), [(340, None), (512, "340 to 511"), (310, "310 to 339")])
def test_a_vocabulary_may_grow_and_lose_rows_that_nobody_uses(
    make: Make, grown: Path, rows: int, said: str | None
) -> None:
    """The data have a tokenizer with 300 ids."""
    wanted = architecture(vocab_size=rows, num_key_value_heads=2)
    model = initial_model(begun_from(grown), wanted, make())
    assert model is not None
    doubt = doubt_about_the_start(model, wanted)
    assert doubt is None if said is None else doubt is not None and f"rows {said} of" in doubt
    before = dict(model.weights())
    after = dict(ResizedVocabulary(before, rows))
    for name, weight in before.items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert after[name] is weight
            continue
        assert after[name].shape == (rows, 32)
        kept = min(rows, 340)
        assert torch.equal(after[name][:kept], weight[:kept])
        mean = weight.double().mean(0).float().expand(rows - kept, -1)
        assert torch.equal(after[name][kept:], mean)


@pytest.mark.parametrize(("rows", "named"), [(299, True), (310, False)])
def test_rows_that_somebody_may_use_are_not_left_out(
    make: Make, grown: Path, rows: int, named: bool
) -> None:
    wanted = architecture(vocab_size=rows, num_key_value_heads=2)
    why = "tokenizer.model has 300 ids" if named else "no tokenizer is there to say"
    with pytest.raises(
        CheckpointError, match=rf"the rows from {rows} on would be lost, and .*{why}"
    ):
        initial_model(begun_from(grown), wanted, make(named=named))


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


@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "two"), ("RANK", "x"), ("RANK", "1")])
def test_what_a_launcher_says_is_checked_before_it_is_used(
    described: list[str],
    name: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, text)
    monkeypatch.setenv("LOCAL_RANK", "3")  # others are not asked: they may be right
    assert main(["train", "configs/run/quickstart.yaml", "--dry-run", *described]) == 2
    said = f"ROOT CAUSE rank {int(text == '1')} (start): {name} is '{text}', but must be a whole"
    assert said in capsys.readouterr().err


def test_a_warning_names_a_path_with_brackets_as_it_is(
    described: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which rich would take for markup, and a stray end of it for an error."""
    folder = tmp_path / "run[/b] [red]" / "of a name that is longer than a line of a terminal"
    folder.mkdir(parents=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tmp_path}/tokens{suffix}", folder / f"other{suffix}")
    changed = f"data={{train: '{folder}/other', valid: {tmp_path}/tokens}}"
    assert main(["train", "configs/run/quickstart.yaml", "--dry-run", *described, changed]) == 0
    assert f"warning: {folder}/other.json is missing" in capsys.readouterr().out


def test_a_dry_run_on_builtin_data_looks_at_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    output = f"output_dir={tmp_path}/run"
    run = load_run_config("configs/run/quickstart.yaml", [output, "train.init_from=nope"])
    with pytest.raises(CheckpointError, match="nope"):
        check_start(run.config, run.architecture)


@pytest.mark.parametrize(
    "more",
    [
        ["data.document_mask=true", "eval.batches=1"],
        ["data.document_mask=true", "eval.batches=1", "eval.protocol=galore_compat"],
        ["eval.batches=1", "eval.protocol=galore_compat"],
    ],
)
def test_an_evaluation_without_targets_is_refused_before_training(
    described: list[str], tmp_path: Path, more: list[str]
) -> None:
    """The set has targets, but none in what an evaluation reads of it: empty documents first."""
    builder = indexed_dataset_module().IndexedDatasetBuilder(
        f"{tmp_path}/empty.bin", dtype=np.uint16
    )
    for ids in [[2]] * 4000 + [[5, 6, 2]] + [[2]] * 100:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(f"{tmp_path}/empty.idx")
    run = load_run_config(
        "configs/run/quickstart.yaml", [*described, f"data.valid={tmp_path}/empty", *more]
    )
    with pytest.raises(DataError, match=r"no token that the evaluation reads.*eval\.batches"):
        check_start(run.config, run.architecture)
    all_of_it = run.config.eval.model_copy(update={"batches": None})
    check_start(run.config.model_copy(update={"eval": all_of_it}), run.architecture)
