"""Reading an HF `LlamaConfig` JSON, in the spellings of transformers 4 and 5 and of the papers.

A key either sets a field, or is known not to change the model, or is an error: a model that differs
from the file without a word would be worse than a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from relora_ds.config.checks import apply_rules
from relora_ds.config.explain import explain
from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.document import Document, Finding, KeyPath, show
from relora_ds.config.reading.source import read_json
from relora_ds.config.reading.suggest import did_you_mean
from relora_ds.errors import ConfigError

# The authors' spelling -> HF's
_ALIASES = {"max_sequence_length": "max_position_embeddings"}

# Written by transformers, or about loading and generation: they do not change the trained function
_NO_EFFECT = frozenset(
    (
        "_name_or_path",
        "_attn_implementation",
        "attn_implementation",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "chunk_size_feed_forward",
        "finetuning_task",
        "task_specific_params",
        "torchscript",
        "return_dict_in_generate",
        "output_scores",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "temperature",
        "top_k",
        "top_p",
    )
)

# Keys that would change the function, and the values under which they do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_bfloat16": (False, None),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
}
_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")


def read_model_config(path: str | Path) -> ModelConfig:
    """Read a model's architecture from an HF `config.json`.

    Raises:
        ConfigError: the file cannot be read, or describes a model other than a plain LLaMA. Holds
            all problems, each with file, line and key.
    """
    document = read_json(path)
    reader = _Reader(document)
    findings = reader.read()
    fields = reader.fields
    broken: set[str] = set()
    try:
        config = ModelConfig.model_validate(fields)
    except ValidationError as error:
        config = None
        for key_path, message in explain(error, fields, ModelConfig):
            key = str(key_path[0])
            broken.add(key)
            findings.append(Finding(reader.origins.get(key, (key,)), message))
    defaults = {
        name: field.default
        for name, field in ModelConfig.model_fields.items()
        if not field.is_required()
    }
    sound = {name: value for name, value in (defaults | fields).items() if name not in broken}
    findings += apply_rules(_RULES, sound)
    problems = document.problems + document.report(findings)
    if problems or config is None:
        raise ConfigError(problems)
    return config


class _Reader:
    """Collects the fields of `ModelConfig` from HF's keys, and where each one came from."""

    def __init__(self, document: Document) -> None:
        self.data = document.data
        self.fields: dict[str, Any] = {}
        self.origins: dict[str, KeyPath] = {}

    def read(self) -> list[Finding]:
        """Fill `fields`; returns what is wrong with the keys themselves."""
        findings = [finding for key in self.data for finding in self._key(key)]
        findings += self._rope()
        if self.fields.get("pad_token_id") == -1:
            # the authors' way of saying none; torch would take it as the last row
            self.fields["pad_token_id"] = None
        findings += self._fill_heads()
        return findings

    def _key(self, key: str) -> Iterator[Finding]:
        value = self.data[key]
        field = _ALIASES.get(key, key)
        if key in _ROPE_KEYS or key in _NO_EFFECT:
            return
        if key == "architectures":
            if value is not None and (
                not isinstance(value, list) or any(name not in _ARCHITECTURES for name in value)
            ):
                yield Finding((key,), f'is {show(value)}, but must be ["LlamaForCausalLM"]')
        elif key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                yield Finding(
                    (key,),
                    f"is {show(value)}, which is not supported: "
                    f"it must be {show(_NEUTRAL[key][0])} or absent",
                )
        elif field not in ModelConfig.model_fields:
            yield Finding(
                (key,), f"unknown key; {did_you_mean(key, [*ModelConfig.model_fields, *_ALIASES])}"
            )
        elif field in self.fields and self.fields[field] != value:
            first = self.origins[field][0]
            yield Finding((key,), f"is {show(value)}, but {first} is {show(self.fields[field])}")
        else:
            self.fields[field] = value
            self.origins[field] = (key,)

    def _rope(self) -> Iterator[Finding]:
        for key in ("rope_scaling", "rope_parameters"):
            block = self.data.get(key)
            if block is None:
                continue
            if not isinstance(block, dict):
                yield Finding((key,), f"is {show(block)}, but must be null or an object")
                continue
            yield from self._rope_block(key, block)
        # null is how configs without the key are written back
        if self.data.get("rope_theta") is not None:
            yield from self._theta(("rope_theta",), self.data["rope_theta"])

    def _rope_block(self, key: str, block: dict[str, Any]) -> Iterator[Finding]:
        if "rope_theta" in block:
            yield from self._theta((key, "rope_theta"), block["rope_theta"])
        for name in ("rope_type", "type"):
            if block.get(name) not in ("default", None):
                message = f'is {show(block[name])}, which is not supported: it must be "default"'
                yield Finding((key, name), message)
                # the other keys are this type's settings
                return
        neutral = {"partial_rotary_factor": 1}
        for name in sorted(block.keys() - {"rope_theta", "rope_type", "type"}):
            if block[name] != neutral.get(name):
                message = f'is {show(block[name])}, but rope_type "default" has no such key'
                yield Finding((key, name), message)

    def _theta(self, path: KeyPath, value: object) -> Iterator[Finding]:
        first = self.fields.setdefault("rope_theta", value)
        origin = self.origins.setdefault("rope_theta", path)
        if first != value:
            where = ".".join(str(part) for part in origin)
            yield Finding(path, f"is {show(value)}, but {where} is {show(first)}: remove one")

    def _fill_heads(self) -> Iterator[Finding]:
        for name in ("num_key_value_heads", "head_dim"):
            # HF writes null for "derive it"
            if self.fields.get(name, 0) is None:
                del self.fields[name]
        heads, width = self.fields.get("num_attention_heads"), self.fields.get("hidden_size")
        if not _is_count(heads) or not _is_count(width):
            # they are reported themselves; what follows from them must not add to that
            self.fields.setdefault("num_key_value_heads", 1)
            self.fields.setdefault("head_dim", 2)
            return
        self.fields.setdefault("num_key_value_heads", heads)
        if "head_dim" in self.fields:
            return
        self.fields["head_dim"] = width // heads if width % heads == 0 else 2
        if width % heads:
            yield Finding(
                ("num_attention_heads",),
                f"is {heads}, but must divide hidden_size ({width}): "
                "change one of them, or set head_dim",
            )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _groups_divide_heads(num_attention_heads: int, num_key_value_heads: int) -> Iterator[Finding]:
    if num_attention_heads % num_key_value_heads:
        yield Finding(
            ("num_key_value_heads",),
            f"is {num_key_value_heads}, but must divide num_attention_heads "
            f"({num_attention_heads})",
        )


def _head_is_even(head_dim: int) -> Iterator[Finding]:
    if head_dim % 2:
        yield Finding(
            ("head_dim",), f"is {head_dim}, but must be even, rotary positions turn pairs"
        )


def _bos_is_in_vocabulary(bos_token_id: int | None, vocab_size: int) -> Iterator[Finding]:
    yield from _in_vocabulary("bos_token_id", bos_token_id, vocab_size)


def _eos_is_in_vocabulary(eos_token_id: int | None, vocab_size: int) -> Iterator[Finding]:
    yield from _in_vocabulary("eos_token_id", eos_token_id, vocab_size)


def _pad_is_in_vocabulary(pad_token_id: int | None, vocab_size: int) -> Iterator[Finding]:
    yield from _in_vocabulary("pad_token_id", pad_token_id, vocab_size)


def _in_vocabulary(key: str, token: int | None, vocab_size: int) -> Iterator[Finding]:
    if token is not None and token >= vocab_size:
        yield Finding((key,), f"is {token}, but must be less than vocab_size ({vocab_size})")


_RULES = (
    _groups_divide_heads,
    _head_is_even,
    _bos_is_in_vocabulary,
    _eos_is_in_vocabulary,
    _pad_is_in_vocabulary,
)
