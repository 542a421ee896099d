"""Adapters that `peft` loads, with the base model beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.checkpoint.export.peft import export_peft
from relora_ds.cli.export import main
from relora_ds.config.methods.lora import LoRAConfig
from relora_ds.errors import CheckpointError
from relora_ds.methods.adapter import AdapterLinear
from relora_ds.methods.lora import LoRA
from relora_ds.parallel.linear import LinearSpec
from tests.golden.make_checkpoint import checkpoint

GOLDEN = [("relora", 2), ("switchlora", 0)]


@pytest.mark.parametrize(("method", "number"), GOLDEN)
def test_peft_computes_what_the_dense_model_does(method: str, number: int, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    source, load = checkpoint(method, number), transformers.AutoModelForCausalLM.from_pretrained
    export_peft(source, tmp_path / "adapter", torch.float32)
    export_hf(source, tmp_path / "hf", torch.float32)
    dense, base = load(tmp_path / "hf"), load(tmp_path / "adapter" / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected, found = dense(input_ids=tokens).logits, adapted(input_ids=tokens).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        with adapted.disable_adapter():
            without = adapted(input_ids=tokens).logits
    assert float((without - expected).abs().max()) > 0.01


@pytest.mark.parametrize(("method", "number"), GOLDEN)
def test_base_and_factors_add_up_to_the_dense_weights(
    method: str, number: int, tmp_path: Path
) -> None:
    """As `peft` reads the files: weight + lora_alpha / r * B A, under its names."""
    arguments = ["--checkpoint", str(checkpoint(method, number)), "--output"]
    assert main([*arguments, str(tmp_path / "adapter"), "--peft"]) == 0
    assert main([*arguments, str(tmp_path / "hf")]) == 0
    dense = load_file(tmp_path / "hf" / "model.safetensors")
    base = load_file(tmp_path / "adapter" / "base" / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert dense.keys() == base.keys()
    adapted = 0
    for name, weight in dense.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if name.split(".")[-2] not in config["target_modules"]:
            assert torch.equal(weight, base[name])
            continue
        lora_a, lora_b = (factors.pop(f"{stem}.lora_{x}.weight") for x in "AB")
        assert lora_a.shape[0] == config["r"]
        whole = base[name] + config["lora_alpha"] / config["r"] * lora_b @ lora_a
        torch.testing.assert_close(whole, weight, atol=1e-6, rtol=1e-6)
        adapted += bool(lora_b.any())
    assert adapted
    assert not factors


def test_a_trained_scaling_is_within_the_factors() -> None:
    config = LoRAConfig(name="lora", rank=2, trainable_scaling=True)
    method = LoRA(config, 1, 9)
    layer = method.linear(LinearSpec("model.layers.0.self_attn.q_proj", 6, 5, False, "column"))
    assert isinstance(layer, AdapterLinear)
    assert layer.scaling is not None
    with torch.no_grad():
        method.initialize(layer, torch.randn(5, 6))
        layer.lora_B.normal_()
        layer.scaling.fill_(-0.4)
        parts = method.adapter(layer)
        whole = parts.base + parts.scale * parts.lora_b @ parts.lora_a
        torch.testing.assert_close(whole, method.dense_weight(layer))


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    export_hf(checkpoint("relora", 2), tmp_path / "hf", torch.float32)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        export_peft(tmp_path / "hf", tmp_path / "adapter", torch.float32)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16)],
)
def test_every_tensor_has_the_chosen_type(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    arguments = ["--checkpoint", str(checkpoint("relora", 2)), "--output", str(output), "--peft"]
    assert main([*arguments, "--dtype", name, "--max-shard-size", "8KB"]) == 0
    shards = sorted((output / "base").glob("*.safetensors"))
    assert len(shards) > 1
    for file in [output / "adapter_model.safetensors", *shards]:
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
