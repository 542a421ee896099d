"""Runs with tokenizers and models made elsewhere: trained, resumed, exported, the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TinyCorpus
from tests.harness.descriptions import describe, write_model
from tests.harness.run import run, write_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
METHOD = {"name": "relora", "rank": 4, "merge_every": 2, "restart_warmup_steps": 1}
TRAIN = {"steps": 5, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4,
         "precision": "fp32"}  # fmt: skip
TEXTS = ["", " a", "The name  is\n\tbound.", "caf\u00e9 e\u0301 \ufb01 \U0001f600 <0x0A>", "x" * 50]


def unigram(text: Path, directory: Path) -> Path:
    """A model like T5's: normalising, without bytes, with other special ids than LLaMA's."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(directory / "unigram"), model_type="unigram",
        vocab_size=300, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return directory / "unigram.model"


def byte_level(text: Path, directory: Path) -> Path:
    """A directory as Llama 3's, with `tokenizer.json` alone."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(text)], trainer)
    made.save(str(directory / "tokenizer.json"))
    return directory


def prepared(tiny_corpus: TinyCorpus, tokenizer: Path, directory: Path) -> dict[str, Path]:
    from relora_ds.data.prepare import prepare

    prepare([tiny_corpus.text], tokenizer, directory / "tokens")
    return {"train": directory / "tokens", "valid": directory / "tokens", "tokenizer": tokenizer}


@pytest.mark.parametrize("make", [unigram, byte_level])
def test_a_run_with_any_tokenizer_resumes_and_exports(
    tiny_corpus: TinyCorpus, tmp_path: Path, make: Any
) -> None:
    from relora_ds.checkpoint.export.dense import DenseModel
    from relora_ds.config.sections import TrainConfig
    from relora_ds.data.tokenizer import open_tokenizer

    transformers = pytest.importorskip("transformers")
    tokenizer = make(tiny_corpus.text, tmp_path)
    files = prepared(tiny_corpus, tokenizer, tmp_path)
    description = describe(tmp_path, METHOD, 1, files, train=TRAIN, checkpoint={"every": 3})
    path = str(write_run(description, tmp_path / "run.yaml"))
    code, output = run([path, "--dry-run"])
    assert code == 0, output
    code, output = run([path])
    assert code == 0, output
    assert "the export says what the tokenizer does" in output
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "latest").write_text("step_3")
    code, output = run([path])
    assert code == 0, output
    assert "resuming from" in output

    ours = open_tokenizer(tokenizer)
    hf = tmp_path / "run" / "hf"
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    expected = [ours.encode(text) for text in TEXTS]
    assert [theirs.encode(text, add_special_tokens=False) for text in TEXTS] == expected
    for file in ("config.json", "generation_config.json"):
        assert json.loads((hf / file).read_text())["eos_token_id"] == ours.eos_id
    assert theirs.eos_token_id == ours.eos_id

    train = TrainConfig.model_validate({**TRAIN, "steps": 1})
    model = DenseModel(checkpoints).model(train, torch.device("cpu"))
    exported = transformers.AutoModelForCausalLM.from_pretrained(hf)
    ids = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model.logits(ids), atol=1e-5, rtol=0)

    arguments = ["--checkpoint", str(checkpoints), "--output", str(tmp_path / "bare")]
    code, output = run([*arguments, "--no-tokenizer"], script="tools/export_hf.py")
    assert code == 0, output
    names = {file.name for file in (tmp_path / "bare").iterdir()}
    card = {"README.md", "training_run.yaml", "training_zero.json"}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert names == {*model, *card, "relora_ds.json"}


def test_ids_of_another_tokenizer_are_refused(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """By evaluation, and by a start from a model that was trained on them."""
    description = describe(tmp_path, METHOD, 1, tiny_corpus.files, train={**TRAIN, "steps": 3})
    path = str(write_run(description, tmp_path / "run.yaml"))
    assert run([path])[0] == 0
    other = prepared(tiny_corpus, unigram(tiny_corpus.text, tmp_path), tmp_path)
    for model in ("run", "run/hf"):
        arguments = ["--checkpoint", str(tmp_path / model), "--data"]
        code, output = run([*arguments, str(other["train"])], script="tools/evaluate.py")
        assert code == 3, output
        assert "another tokenizer" in output
        code, output = run([*arguments, str(tiny_corpus.valid)], script="tools/evaluate.py")
        assert code == 0, output

        data = {key: str(value) for key, value in other.items()}
        start = {**description, "output_dir": str(tmp_path / "later"), "data": data}
        start["train"] = {**start["train"], "init_from": str(tmp_path / model)}
        later = str(write_run(start, tmp_path / "later.yaml"))
        for arguments in ([later], [later, "--dry-run"]):
            code, output = run(arguments)
            assert code == 3, output
            assert "another tokenizer" in output


def test_a_model_as_llama_3_2_s_is_continued(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Rotary scaling, a tied head, several ids that end a text, shards; named as a directory."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 500000.0}  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=[2, 5], rope_parameters=rope)  # fmt: skip
    torch.manual_seed(0)
    first = transformers.LlamaForCausalLM(config)
    directory = tmp_path / "llama"
    first.save_pretrained(directory, max_shard_size="40KB")
    assert (directory / "model.safetensors.index.json").exists()
    optimizer = {"lr": 1e-12}
    description = describe(
        tmp_path, {"name": "full"}, 1, tiny_corpus.files, optimizer=optimizer,
        train={**TRAIN, "steps": 3, "init_from": str(directory)},
    )  # fmt: skip
    description["model"] = str(directory)
    path = str(write_run(description, tmp_path / "run.yaml"))
    code, output = run([path, "--dry-run"])
    assert code == 0, output
    code, output = run([path])
    assert code == 0, output
    ids = torch.arange(64).unsqueeze(0)

    def check_export(directory: Path) -> None:
        last = transformers.AutoModelForCausalLM.from_pretrained(directory)
        assert last.config.eos_token_id == [2, 5]
        with torch.no_grad():
            torch.testing.assert_close(last(ids).logits, first(ids).logits, atol=1e-5, rtol=0)

    check_export(tmp_path / "run" / "hf")
    # a step further from its own checkpoint; and the same from an import, whose export is the model
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    for script, source, target in (
        ("import_hf", ["--input", str(directory)], imported),
        ("export_hf", ["--checkpoint", str(imported)], exported),
    ):
        code, output = run([*source, "--output", str(target)], script=f"tools/{script}.py")
        assert code == 0, output
    check_export(exported)
    code, output = run([path, "train.steps=4", "checkpoint.allow_change=[train.steps]"])
    assert code == 0, output
    assert "resuming from" in output
    check_export(tmp_path / "run" / "hf")
    resumed = [f"checkpoint.resume={imported}", "train.init_from=null"]
    code, output = run([path, f"output_dir={tmp_path / 'other'}", *resumed])
    assert code == 0, output
    check_export(tmp_path / "other" / "hf")

    # another function: named key by key, before an earlier run makes way
    plain = write_model(tmp_path, tie_word_embeddings=True, num_key_value_heads=2)
    arguments = [path, f"model={plain}", "checkpoint.resume=false"]
    code, output = run(arguments)
    assert code == 4, output
    parts = "rope_theta 500000.0 instead of 10000.0", "rope_scaling", "another one than"
    assert all(part in output for part in parts), output
    assert not (tmp_path / "run" / "previous_1").exists()
