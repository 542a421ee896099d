"""The shapes of 36 public configurations of the LLaMA family: read, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relora_ds.config.architecture import read_model_config
from relora_ds.errors import ConfigError


def sizes(
    hidden: int, inner: int, layers: int, heads: int, vocab: int, groups: int | None = None
) -> dict[str, Any]:
    found = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
             "num_attention_heads": heads, "vocab_size": vocab}  # fmt: skip
    return found if groups is None else {**found, "num_key_value_heads": groups}


COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
    "use_cache": True,
}  # fmt: skip
SMALL = sizes(4096, 11008, 32, 32, 32000)
PLAIN = {"rope_scaling": None, "rope_theta": 10000.0, "attention_bias": False}
LLAMA_3 = {
    **COMMON, **sizes(4096, 14336, 32, 32, 128256, 8), "bos_token_id": 128000,
    "eos_token_id": 128001, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "attention_dropout": 0.0, "pretraining_tp": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
LONG = {**LLAMA_3, "max_position_embeddings": 131072, "rope_scaling": SCALED, "mlp_bias": False}
LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
MISTRAL = {
    **COMMON, **sizes(4096, 14336, 32, 32, 32768, 8), "architectures": ["MistralForCausalLM"],
    "model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
DUMP = {
    **COMMON, **SMALL, "num_key_value_heads": 32, "head_dim": 128, "attention_dropout": 0.0,
    "max_position_embeddings": 4096, "dtype": "bfloat16", "mlp_bias": False, "pad_token_id": None,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip

READ: dict[str, dict[str, Any]] = {
    "LLaMA 7B": {**COMMON, **SMALL, "max_position_embeddings": 2048, "pad_token_id": 0},
    "LLaMA 7B, first spelling": {
        **COMMON, **SMALL, "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0,
        "eos_token_id": 1, "max_sequence_length": 2048, "pad_token_id": -1},
    "Llama 2 7B": {**COMMON, **SMALL, "max_position_embeddings": 4096, "pretraining_tp": 1,
                   "rope_scaling": None, "num_key_value_heads": 32},
    "Llama 2 13B": {**COMMON, **sizes(5120, 13824, 40, 40, 32000, 40), "pretraining_tp": 2,
                    "max_position_embeddings": 4096, "rope_scaling": None},
    "Llama 2 70B": {**COMMON, **sizes(8192, 28672, 80, 64, 32000, 8), "pretraining_tp": 1,
                    "max_position_embeddings": 4096, **PLAIN},
    "Llama 3 8B": LLAMA_3,
    "Llama 3.1 8B": LONG,
    "Llama 3.1 8B Instruct": {**LONG, "eos_token_id": [128001, 128008, 128009]},
    "Llama 3.2 1B": {**LONG, **sizes(2048, 8192, 16, 32, 128256, 8), "head_dim": 64,
                     "tie_word_embeddings": True, "rope_scaling": {**SCALED, "factor": 32.0}},
    "Llama 3.1 8B, version 5": {
        **{key: value for key, value in LONG.items() if key not in ("rope_scaling", "rope_theta")},
        "rope_parameters": {**SCALED, "rope_theta": 500000.0}},
    "TinyLlama": {**COMMON, **sizes(2048, 5632, 22, 32, 32000, 4), "rope_scaling": None,
                  "max_position_embeddings": 2048, "pretraining_tp": 1},
    "CodeLlama 7B": {**COMMON, **sizes(4096, 11008, 32, 32, 32016, 32), "rope_theta": 1e6,
                     "max_position_embeddings": 16384, "pretraining_tp": 1, "rope_scaling": None},
    "CodeLlama 34B": {**COMMON, **sizes(8192, 22016, 48, 64, 32000, 8), "rope_theta": 1000000,
                      "max_position_embeddings": 16384, "pretraining_tp": 1},
    "Vicuna 1.3": {**COMMON, **SMALL, "_name_or_path": "vicuna", "pad_token_id": 0,
                   "max_position_embeddings": 2048},
    "Vicuna 16k": {**COMMON, **SMALL, "max_position_embeddings": 4096, "rope_scaling": LINEAR,
                   "max_sequence_length": 16384, "pretraining_tp": 1},
    "OpenLLaMA 3B": {**COMMON, **sizes(3200, 8640, 26, 32, 32000), "pad_token_id": 0,
                     "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "Yi 6B": {**COMMON, **sizes(4096, 11008, 32, 32, 64000, 4), "rope_theta": 5000000.0,
              "max_position_embeddings": 4096, "pad_token_id": 0},
    "DeepSeek LLM 7B": {**COMMON, **sizes(4096, 11008, 30, 32, 102400, 32), **PLAIN,
                        "bos_token_id": 100000, "eos_token_id": 100001,
                        "max_position_embeddings": 4096, "pretraining_tp": 1},
    "DeepSeek Coder": {**COMMON, **sizes(2048, 5504, 24, 16, 32256, 16), "rope_scaling": LINEAR,
                       "rope_theta": 100000, "bos_token_id": 32013, "eos_token_id": 32014,
                       "max_position_embeddings": 16384},
    "Together 32k": {**COMMON, **SMALL, "max_position_embeddings": 32768, "pad_token_id": 0,
                     "rope_scaling": {"factor": 8.0, "type": "linear"},
                     "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}},
    "Yarn Llama 2 64k": {**COMMON, **SMALL, "max_position_embeddings": 65536, "rope_scaling": YARN,
                         "pretraining_tp": 1},
    "llama-68m": {**COMMON, **sizes(768, 3072, 2, 12, 32000), "bos_token_id": 0,
                  "max_position_embeddings": 2048, "pad_token_id": 1},
    "a dump of version 5": DUMP,
    "a full dump of version 5": {
        **DUMP, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_beams": 1,
        "is_decoder": False, "is_encoder_decoder": False, "output_attentions": False,
        "problem_type": None, "return_dict": True, "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None, "pruned_heads": {}, "torchscript": False,
        "tie_encoder_decoder": False, "typical_p": 1.0, "use_bfloat16": False},
    "SmolLM": {**COMMON, **sizes(576, 1536, 30, 9, 49152, 3), "is_llama_config": True,
               "rope_interleaved": False, "rope_scaling": None, "max_position_embeddings": 2048,
               "tie_word_embeddings": True, "pad_token_id": 2, "transformers.js_config": {}},
    "SmolLM 2": {**COMMON, **sizes(2048, 8192, 24, 32, 49152, 32), "is_llama_config": True,
                 "rope_interleaved": False, "rope_theta": 130000, "mlp_bias": False,
                 "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "saved by unsloth": {**LLAMA_3, "unsloth_version": "2024.9", "unsloth_fixed": True},
    "saved by MLC": {**COMMON, **SMALL, "context_window_size": 4096, "prefill_chunk_size": 4096,
                     "tensor_parallel_shards": 1, "max_batch_size": 80,
                     "max_position_embeddings": 4096},
    "Mistral 0.3": {**MISTRAL, "sliding_window": None},
    "InternLM": {**COMMON, **sizes(4096, 11008, 32, 32, 103168), "bias": True,
                 "architectures": ["InternLMForCausalLM"], "model_type": "internlm",
                 "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"},
                 "max_position_embeddings": 2048, "pad_token_id": 2},
    "code beside the model": {**COMMON, **SMALL, "max_position_embeddings": 2048,
                              "auto_map": {"AutoModel": "modeling.Model"}},
    "stories15M": {**COMMON, **sizes(288, 768, 6, 6, 32000, 6), "max_position_embeddings": 256},
    "tiny random": {**COMMON, **sizes(16, 64, 2, 4, 32000), "max_position_embeddings": 2048,
                    "pad_token_id": -1},
    "biased": {**COMMON, **sizes(512, 1376, 8, 8, 32000), "attention_bias": True,
               "mlp_bias": True, "max_position_embeddings": 1024},
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "Mistral 0.1": ({**MISTRAL, "sliding_window": 4096}, "sliding_window", "must be null"),
    "GPTQ": (
        {**COMMON, **SMALL, "max_position_embeddings": 4096,
         "quantization_config": {"bits": 4, "quant_method": "gptq"}},
        "quantization_config", "which is not supported"),
}  # fmt: skip


def test_so_many_were_looked_at() -> None:
    assert len(READ) + len(REFUSED) == 36


@pytest.mark.parametrize("name", READ)
def test_read(tmp_path: Path, name: str) -> None:
    source = READ[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(source))
    config = read_model_config(path)
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(config, key) == source[key]
    ends = source["eos_token_id"]
    assert config.eos_token_id == (tuple(ends) if isinstance(ends, list) else ends)
    scaled = source.get("rope_scaling") or source.get("rope_parameters", {})
    kind = scaled.get("rope_type", scaled.get("type", "default"))
    assert (config.rope_scaling is None) == (kind == "default")
    if config.rope_scaling is not None:
        assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == (
            kind, scaled["factor"],
        )  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_key_and_reason(tmp_path: Path, name: str) -> None:
    source, key, reason = REFUSED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(source, indent=1))
    with pytest.raises(ConfigError) as error:
        read_model_config(path)
    (problem,) = error.value.problems
    assert f": {key}: is " in problem
    assert reason in problem
