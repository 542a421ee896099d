"""What is known of the keys of Hugging Face's `config.json` beyond those that build a model.

Data only: which keys do not change the trained function, and under which values others do not.
"""

from __future__ import annotations

from typing import Any

ALIASES = {"max_sequence_length": "max_position_embeddings"}
"""The papers' spelling, and Hugging Face's."""

FAMILIES = {
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "internlm": ("InternLMForCausalLM", "InternLMModel"),
}
"""Values of `model_type` that compute what a LLaMA does, and their `architectures`. Mistral does
without a sliding window, InternLM's first models with biases in the attention."""

# Written by transformers, or about loading and generation
_TRANSFORMERS = """
    _name_or_path _attn_implementation attn_implementation transformers_version torch_dtype dtype
    use_cache output_attentions output_hidden_states return_dict use_return_dict id2label label2id
    num_labels problem_type chunk_size_feed_forward finetuning_task task_specific_params torchscript
    return_dict_in_generate output_scores max_length min_length do_sample early_stopping num_beams
    temperature top_k top_p typical_p num_beam_groups diversity_penalty repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences prefix tokenizer_class sep_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens tf_legacy_loss cross_attention_hidden_size auto_map
    max_new_tokens use_flash_attn
"""
# Stamps of programs that write a model again
_STAMPS = """
    context_window_size prefill_chunk_size tensor_parallel_shards pipeline_parallel_stages
    max_batch_size transformers.js_config model_max_length
"""
NO_EFFECT = frozenset(f"{_TRANSFORMERS} {_STAMPS}".split())
"""Keys that do not change the trained function."""
STAMP_PREFIXES = ("_", "unsloth_")
"""Beginnings of keys that are comments or stamps."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "quantization": (None,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_bfloat16": (False, None),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "is_llama_config": (True, None),
    "rope_interleaved": (False, None),
}
"""Keys that would change the function, and the values under which they do not."""

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
"""Keys that rotary positions are read from together."""
ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, None),
    "finetuned": (True, False, None),
}
"""Keys of a rotary block that may stand beside its own, and the values that they may have."""
