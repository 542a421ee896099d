"""A model made elsewhere as a checkpoint: every bit of it, proved like any other, or an error."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import write_manifest
from relora_ds.checkpoint.rewriting.import_hf import import_hf
from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import open_saved_run
from relora_ds.cli.main import main
from relora_ds.config.methods.full import FullConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.errors import CheckpointError, ConfigError, DataError, ReloraError
from relora_ds.methods.build import build_model
from relora_ds.methods.full import Full
from relora_ds.model.hf.directory import write_hf
from relora_ds.model.init import InitialWeights, dense_shapes

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODEL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, as Llama 3.2": {"tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def architecture(variant: str) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL, **VARIANTS[variant]})


def drawn(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights = InitialWeights(config, seed=3)
    return {name: weights(name, shape).to(dtype) for name, shape in dense_shapes(config).items()}


def bits(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor of a directory, by name."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (file.get_slice(name).get_dtype(), raw)
    return found


def in_torchs_format(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_every_bit_comes_back(tmp_path: Path, variant: str, dtype: str, shard_bytes: int) -> None:
    config = architecture(variant)
    source, imported, out = (tmp_path / name for name in ("hf", "imported", "out"))
    weights = drawn(config, DTYPES[dtype])
    write_hf(source, config, weights.items(), None, DTYPES[dtype], shard_bytes)
    import_hf(source, imported)
    export_hf(imported, out, None)
    assert bits(out) == bits(source)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_tensors_keep_a_dtype_each(tmp_path: Path) -> None:
    config = architecture("plain")
    weights = {
        name: weight.float() if "norm" in name else weight
        for name, weight in drawn(config, torch.bfloat16).items()
    }
    write_hf(tmp_path / "hf", config, weights.items(), None, None)
    in_torchs_format(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported")
    export_hf(tmp_path / "imported", tmp_path / "out", None)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: t.dtype for name, t in out.items()} == {n: w.dtype for n, w in weights.items()}
    assert all(torch.equal(out[name], weight) for name, weight in weights.items())
    # nothing is lost by whoever loads all of them in one dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_transformers_does(tmp_path: Path, variant: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = architecture(variant)
    write_hf(tmp_path / "hf", config, drawn(config, torch.float32).items(), None, torch.float32)
    import_hf(tmp_path / "hf", tmp_path / "imported")
    train = TrainConfig(steps=1, seq_length=64, micro_batch_size=1, global_batch_size=1)
    model = DenseModel(tmp_path / "imported").model(train, torch.device("cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        torch.testing.assert_close(model.logits(tokens), expected, atol=1e-5, rtol=0)


def test_a_start_takes_the_same_weights_as_from_the_directory(tmp_path: Path) -> None:
    config = architecture("tied, as Llama 3.2")
    write_hf(tmp_path / "hf", config, drawn(config, torch.bfloat16).items(), None, torch.bfloat16)
    import_hf(tmp_path / "hf", tmp_path / "imported")
    train = TrainConfig(steps=1, seq_length=64, micro_batch_size=1, global_batch_size=1)
    method, cpu = Full(FullConfig(name="full"), seed=0, steps=1), torch.device("cpu")

    def built(path: Path) -> Mapping[str, torch.Tensor]:
        weights = DenseModel(path).weights()
        model = build_model(config, method, train, lambda name, _: weights[name], cpu)
        return model.state_dict()

    ours, theirs = built(tmp_path / "imported"), built(tmp_path / "hf")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = architecture("plain")
    write_hf(tmp_path / "hf", config, drawn(config, torch.float32).items(), None, torch.float32)
    return tmp_path / "hf"


def changed(
    change: Callable[[dict[str, torch.Tensor]], Any],
) -> Callable[[Path], Any]:
    """Alter the tensors of a directory."""

    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


NORM, HEAD = "model.norm.weight", "lm_head.weight"
BAD: dict[str, tuple[Callable[[Path], Any], type[ReloraError], str]] = {
    "no directory": (shutil.rmtree, ConfigError, "holds no config.json: give the directory of"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), CheckpointError, "holds neither"),
    "another family": (
        lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'),
        ConfigError,
        'model_type: is "gpt2", which is not supported',
    ),
    "cut": (
        lambda d: (d / "model.safetensors").write_bytes(b"x" * 50),
        CheckpointError,
        "cannot be read as safetensors",
    ),
    "not finite": (
        changed(lambda t: t[NORM].fill_(float("nan"))),
        CheckpointError,
        f"{NORM} holds values that are not finite",
    ),
    "missing": (changed(lambda t: t.pop(HEAD)), CheckpointError, f"1 missing: {HEAD}"),
    "integers": (
        changed(lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        CheckpointError,
        rf"{NORM} is stored as torch\.int8, but .* float32, bfloat16, float16",
    ),
    "wider": (
        changed(lambda t: t.update({NORM: t[NORM].double()})),
        CheckpointError,
        rf"{NORM} is stored as torch\.float64, but .*: save the model in one of them",
    ),
    "tokenizer": (
        lambda d: (d / "tokenizer.model").write_bytes(b"junk"),
        DataError,
        r"tokenizer\.model: not a SentencePiece model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_imported_leaves_nothing(source: Path, case: str) -> None:
    spoil, kind, words = BAD[case]
    spoil(source)
    target = source.with_name("imported")
    with pytest.raises(kind, match=words):
        import_hf(source, target)
    assert [path.name for path in source.parent.iterdir() if path != source] == []
    assert main(["import", "--input", str(source), "--output", str(target)]) == kind.exit_code


def test_a_target_that_is_there_is_left_alone(source: Path) -> None:
    target = source.with_name("imported")
    target.mkdir()
    with pytest.raises(ConfigError, match="imported exists: name a new directory"):
        import_hf(source, target)
    assert list(target.iterdir()) == []
    target.rmdir()
    target.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="imported exists: name a new directory"):
        import_hf(source, target)


def test_what_lies_beside_a_target_stays(source: Path) -> None:
    other = source.with_name("imported.tmp")
    other.mkdir()
    (other / "mine").touch()
    import_hf(source, source.with_name("imported"))
    assert (other / "mine").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file, and on a disk that is full when half of it is written."""
    (source.parent / "file").touch()
    with pytest.raises(CheckpointError, match=r"the checkpoint .* cannot be written: .*file"):
        import_hf(source, source.parent / "file" / "imported")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "manifest.json")

    monkeypatch.setattr("relora_ds.checkpoint.rewriting.place.write_manifest", full)
    with pytest.raises(CheckpointError, match="No space left on device; free some space there"):
        import_hf(source, source.with_name("imported"))
    assert sorted(path.name for path in source.parent.iterdir()) == ["file", "hf"]


def test_a_tokenizer_that_cannot_be_read_can_be_left_out(source: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"junk")
    target = source.with_name("imported")
    arguments = ["--input", str(source), "--output", str(target)]
    assert main(["import", *arguments, "--no-tokenizer"]) == 0
    assert not (target / "tokenizer.model").exists()
    assert main(["export", "--checkpoint", str(target), "--output", str(target / "hf")]) == 0


def test_an_import_needs_no_reshaping(source: Path) -> None:
    target = source.with_name("imported")
    import_hf(source, target)
    with pytest.raises(ConfigError, match="an import, which runs of any number of processes"):
        reshape_checkpoint(target, source.with_name("other"), dp_size=4, stage=3)


def test_an_import_with_steps_behind_it_is_damaged(source: Path) -> None:
    target = source.with_name("imported")
    import_hf(source, target)
    assert open_saved_run(target).is_import
    trainer = json.loads((target / layout.TRAINER).read_text())
    tokens = trainer["step"] + 64
    content = json.dumps({**trainer, "step": 1, "tokens": tokens})
    (target / layout.TRAINER).write_text(content)
    write_manifest(target)
    with pytest.raises(CheckpointError, match="have no steps behind them"):
        open_saved_run(target)
