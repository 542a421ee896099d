"""Model directories: transformers loads what we write, we read it back, and damage is named."""

from __future__ import annotations

import json
import random
import re
import socket
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.files.scratch import scratch_folder
from relora_ds.model.hf.directory import recover_export, write_hf
from relora_ds.model.hf.weights import HfWeights, read_hf
from relora_ds.model.init import InitialWeights, dense_shapes


def drawn(config):
    weights = InitialWeights(config, seed=3)
    return {name: weights(name, shape) for name, shape in dense_shapes(config).items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_transformers_scores_as_we_do(tmp_path, config, build, tokens, shard_bytes):
    transformers = pytest.importorskip("transformers")
    model = build(config)
    write_hf(tmp_path / "hf", config, model.named_parameters(), None, torch.float32, shard_bytes)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        torch.testing.assert_close(model.logits(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_round_trip(tmp_path, config, dtype, shard_bytes):
    weights = drawn(config)
    write_hf(tmp_path / "hf", config, reversed(weights.items()), None, dtype, shard_bytes)
    got_config, got = read_hf(tmp_path / "hf")
    assert got_config == config
    assert list(got) == list(weights)
    assert len(got) == len(weights)
    assert all(torch.equal(got[name], weights[name].to(dtype)) for name in weights)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes == 9000)
    if index.exists():
        content = json.loads(index.read_text())
        assert set(content["weight_map"]) == set(weights)
        size = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
        assert content["metadata"]["total_size"] == size


def test_views_of_one_buffer_are_written(tmp_path, plain):
    shapes = dense_shapes(plain)
    flat = torch.arange(sum(torch.Size(s).numel() for s in shapes.values()), dtype=torch.float32)
    parts = flat.split([torch.Size(shape).numel() for shape in shapes.values()])
    weights = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
    write_hf(tmp_path / "hf", plain, weights.items(), None, torch.float32)
    _, got = read_hf(tmp_path / "hf")
    assert all(torch.equal(got[name], weights[name]) for name in weights)


def test_target_is_replaced_only_if_it_is_an_export(tmp_path, plain):
    target, weights = tmp_path / "deep" / "hf", drawn(plain)
    write_hf(target, plain, weights.items(), None, torch.float32)
    write_hf(target, plain, weights.items(), None, torch.bfloat16)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert stat.S_IMODE(target.stat().st_mode) & 0o500 == 0o500
    assert [path.name for path in target.parent.iterdir()] == ["hf"]

    save_file(load_file(target / "model.safetensors"), target / "model.safetensors")
    with pytest.raises(ConfigError, match="is not an earlier export; name a new directory"):
        write_hf(target, plain, weights.items(), None, torch.float32)
    (tmp_path / "empty").mkdir()
    write_hf(tmp_path / "empty", plain, weights.items(), None, torch.float32)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not an earlier export"):
        write_hf(tmp_path / "file", plain, weights.items(), None, torch.float32)


@pytest.mark.parametrize("name", ["notes.txt", "base/mine.gguf", ".git/config", "model.gguf"])
def test_an_export_with_somebody_s_files_in_it_stays(tmp_path, plain, name):
    target, weights = tmp_path / "hf", drawn(plain)
    write_hf(target, plain, weights.items(), None, torch.float32, shard_bytes=1)
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    before = sorted(target.rglob("*"))
    seen = re.escape(name.removesuffix("/config"))
    with pytest.raises(ConfigError, match=f"holds {seen}, which no export writes: move it"):
        write_hf(target, plain, weights.items(), None, torch.bfloat16)
    assert sorted(target.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (target / name).unlink()
    if (target / ".git").exists():
        (target / ".git").rmdir()
    write_hf(target, plain, weights.items(), None, torch.bfloat16)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


CARD = {"README.md": "# a model\n"}


@pytest.mark.parametrize("name", ["README.md", "generation_config.json"])
def test_a_file_of_an_export_that_was_edited_stays(tmp_path, plain, name):
    target, weights = tmp_path / "hf", drawn(plain)
    write_hf(target, plain, weights.items(), None, torch.float32, texts=CARD)
    write_hf(target, plain, weights.items(), None, torch.float32, texts=CARD)
    written = (target / name).read_text()
    (target / name).write_text(f"{written}mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which was edited since: move it"):
        write_hf(target, plain, weights.items(), None, torch.bfloat16, texts=CARD)
    assert (target / name).read_text() == f"{written}mine"
    (target / name).rename(tmp_path / "moved")
    write_hf(target, plain, weights.items(), None, torch.bfloat16, texts=CARD)
    assert (target / name).read_text() == written


@pytest.mark.parametrize("record", [None, "", "[]", '{"sha256": 3}', '{"sha256": {}}'])
def test_an_export_that_records_nothing_is_replaced(tmp_path, plain, record):
    """As earlier versions wrote them."""
    target, weights = tmp_path / "hf", drawn(plain)
    write_hf(target, plain, weights.items(), None, torch.float32, texts=CARD)
    (target / "relora_ds.json").unlink()
    if record is not None:
        (target / "relora_ds.json").write_text(record)
    write_hf(target, plain, weights.items(), None, torch.bfloat16, texts=CARD)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_file_that_comes_while_an_export_is_written_stays(tmp_path, plain):
    target, weights = tmp_path / "hf", drawn(plain)
    write_hf(target, plain, weights.items(), None, torch.float32)

    def slowly():
        yield from weights.items()
        (target / "late.txt").write_text("mine")

    with pytest.raises(ConfigError, match=r"holds late\.txt, which no export writes"):
        write_hf(target, plain, slowly(), None, torch.bfloat16)
    assert (target / "late.txt").read_text() == "mine"
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"


def test_what_a_killed_export_left_is_undone(tmp_path, plain):
    target, scratch = tmp_path / "hf", tmp_path / ".hf.dead"
    write_hf(target, plain, drawn(plain).items(), None, torch.float32)
    content = (target / "config.json").read_bytes()
    with scratch_folder(tmp_path, ".hf.") as in_use:
        scratch.mkdir()
        target.rename(scratch / "old")  # killed between the two renames of its publication
        (scratch / ".owner").write_text(f"{socket.gethostname()} 1\n")
        recover_export(target)
        assert in_use.is_dir()
    assert not scratch.exists()
    assert (target / "config.json").read_bytes() == content


def without(name):
    return lambda weights: [(n, w) for n, w in weights.items() if n != name]


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), f"1 missing: {NORM}"),
        (lambda w: [*w.items(), ("extra", w[NORM])], "1 unexpected: extra"),
        (lambda w: [*w.items(), (NORM, w[NORM])], f"{NORM} was given twice"),
        (lambda w: {**w, NORM: w[NORM][1:]}.items(), rf"{NORM} \(31,\) instead of \(32,\)"),
        (lambda w: [], r"21 missing: model.embed_tokens.weight, .* and 13 more"),
    ],
)
def test_wrong_weights_leave_nothing_behind(tmp_path, plain, change, message):
    with pytest.raises(CheckpointError, match=message):
        write_hf(tmp_path / "hf", plain, change(drawn(plain)), None, torch.float32)
    assert not list(tmp_path.iterdir())


def test_integer_export_is_refused(tmp_path, plain):
    with pytest.raises(ConfigError, match="use fp32, bf16 or fp16"):
        write_hf(tmp_path / "hf", plain, drawn(plain).items(), None, torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), f"1 missing: {NORM}"),
        (lambda w: [*w.items(), ("extra", w[NORM])], "1 unexpected: extra"),
        (lambda w: {**w, NORM: w[NORM][1:]}.items(), rf"{NORM} \(31,\) instead of \(32,\)"),
    ],
)
def test_reading_weights_of_another_model(tmp_path, plain, change, message):
    write_hf(tmp_path, plain, drawn(plain).items(), None, torch.float32)
    changed = {name: w.clone() for name, w in change(drawn(plain))}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_hf(tmp_path)


def test_reading_ignores_rotary_tables_and_a_copy_of_a_tied_head(tmp_path, plain):
    config = plain.model_copy(update={"tie_word_embeddings": True})
    weights = drawn(config)
    write_hf(tmp_path, config, weights.items(), None, torch.float32)
    stored = {
        **weights,
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(stored, tmp_path / "model.safetensors")
    assert list(read_hf(tmp_path)[1]) == list(weights)


def test_damaged_files_are_named(tmp_path, plain):
    write_hf(tmp_path, plain, drawn(plain).items(), None, torch.float32, 9000)
    shard = next(tmp_path.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"model-00002.* cannot be read as safetensors"):
        read_hf(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.* cannot be read as safetensors"):
        read_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        read_hf(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model"):
        read_hf(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_of_torch_are_read(tmp_path, plain, zipped, shards):
    write_hf(tmp_path, plain, drawn(plain).items(), None, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    weights = drawn(plain)
    names = [list(weights)[number::shards] for number in range(shards)]
    files = [f"pytorch_model-{number:05d}.bin" for number in range(shards)]
    for file, part in zip(files, names, strict=True):
        stored = {name: weights[name].half() for name in part}
        torch.save(stored, tmp_path / file, _use_new_zipfile_serialization=zipped)
    if shards == 1:
        (tmp_path / files[0]).rename(tmp_path / "pytorch_model.bin")
    else:
        weight_map = {n: file for file, part in zip(files, names, strict=True) for n in part}
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, got = read_hf(tmp_path)
    assert all(torch.equal(got[name], weights[name].half()) for name in weights)


class Payload:
    """Creates a file where it is unpickled as pickle allows it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_of_torch_does_not_run(tmp_path, plain, zipped):
    write_hf(tmp_path, plain, drawn(plain).items(), None, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    stored = {**drawn(plain), "extra": Payload(tmp_path / "trace")}
    path = tmp_path / "pytorch_model.bin"
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="tensors and nothing else"):
        read_hf(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "nothing else"), (b"version https://git-lfs", "nothing else")]
)
def test_a_damaged_file_of_torch_is_named(tmp_path, plain, content, message):
    write_hf(tmp_path, plain, drawn(plain).items(), None, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_hf(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="something else than tensors by name"):
        read_hf(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_random_damage_of_a_file_of_torch_is_refused_or_read(tmp_path, plain, zipped):
    """Torch's readers raise whatever comes; without a checksum a changed value is a value."""
    write_hf(tmp_path, plain, drawn(plain).items(), None, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(drawn(plain), path, _use_new_zipfile_serialization=zipped)
    whole, draw, refused = path.read_bytes(), random.Random(7), 0
    for number in range(200):
        content = bytearray(whole)
        for _ in range(3):  # the descriptions are at both ends
            at = draw.randrange(3000)
            content[at if number % 2 else -1 - at] = draw.randrange(256)
        path.write_bytes(content)
        try:
            read_hf(tmp_path)
        except CheckpointError:
            refused += 1
    assert 20 < refused < 200


def test_a_file_of_torch_claims_no_more_than_it_has(tmp_path, plain):
    write_hf(tmp_path, plain, drawn(plain).items(), None, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    repeated = {**drawn(plain), "model.norm.weight": torch.ones(1).expand(2**40)}
    torch.save(repeated, path)
    with pytest.raises(CheckpointError, match=r"shape \(1099511627776,\) with less memory"):
        read_hf(tmp_path)
    torch.save(drawn(plain), path)
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in records.items():
            target.writestr(name, content)
    with pytest.raises(CheckpointError, match="compressed records"):
        read_hf(tmp_path)


@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_equal_models_give_equal_files_that_colleagues_can_read(tmp_path, plain, shard_bytes):
    for name in ("one", "two"):
        weights = drawn(plain).items()
        write_hf(tmp_path / name, plain, weights, None, torch.bfloat16, shard_bytes)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in files:
        first, second = tmp_path / "one" / name, tmp_path / "two" / name
        assert first.read_bytes() == second.read_bytes()
        assert stat.S_IMODE(first.stat().st_mode) == stat.S_IMODE(
            (tmp_path / "one" / "config.json").stat().st_mode
        )


@pytest.mark.parametrize(
    "name", ["/etc/shadow", "../other/model.safetensors", "a/b.safetensors", "", ".", "..", 3, None]
)
def test_an_index_names_files_beside_it(tmp_path: Path, name: object) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json names .*, which is no file beside it"):
        HfWeights(tmp_path, {"model.norm.weight": (4,)})
