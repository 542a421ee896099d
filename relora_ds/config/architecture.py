"""Reading an HF `LlamaConfig` JSON, in the spellings of transformers 4 and 5 and of the papers.

A key either sets a field, or is known not to change the model, or is an error: a model that differs
from the file without a word would be worse than a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from relora_ds.config.base import Section
from relora_ds.config.checks import apply_rules
from relora_ds.config.explain import explain
from relora_ds.config.model import LinearRope, Llama3Rope, ModelConfig, RopeScaling, YarnRope
from relora_ds.config.model_keys import (
    ALIASES,
    FAMILIES,
    NEUTRAL,
    NO_EFFECT,
    ROPE_KEYS,
    ROPE_NEUTRAL,
    STAMP_PREFIXES,
)
from relora_ds.config.reading.document import Document, Finding, KeyPath, show
from relora_ds.config.reading.source import read_json
from relora_ds.config.reading.suggest import did_you_mean
from relora_ds.errors import ConfigError

_ROPES: dict[str, type[Section]] = {
    "linear": LinearRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}


def model_file(path: str | Path) -> Path:
    """The `config.json` that `model` names: a file, or a directory that holds one."""
    return Path(path, "config.json") if Path(path).is_dir() else Path(path)


def read_model_config(path: str | Path) -> ModelConfig:
    """Read a model's architecture from an HF `config.json`, or from the directory of a model.

    Raises:
        ConfigError: the file cannot be read, or describes a model other than a plain LLaMA. Holds
            all problems, each with file, line and key.
    """
    document = read_json(model_file(path))
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
        field = ALIASES.get(key, key)
        if key in ROPE_KEYS or key in NO_EFFECT or key.startswith(STAMP_PREFIXES):
            return
        if key in ("model_type", "architectures", "bias"):
            yield from self._family_key(key, value)
        elif key == "pretraining_tp":  # a way of computing the same products
            if value is not None and not _is_count(value):
                yield Finding((key,), f"is {show(value)}, but must be a number of slices")
        elif key in NEUTRAL:
            if value not in NEUTRAL[key]:
                yield Finding(
                    (key,),
                    f"is {show(value)}, which is not supported: "
                    f"it must be {show(NEUTRAL[key][0])} or absent",
                )
        elif field not in ModelConfig.model_fields:
            known = did_you_mean(key, [*ModelConfig.model_fields, *ALIASES])
            remedy = "remove it if it does not change what the model computes"
            yield Finding((key,), f"unknown key; {known}; {remedy}")
        elif field != key and field in self.data and self.data[field] is not None:
            yield from self._second_spelling(key, field)
        elif key == "eos_token_id" and isinstance(value, list):
            self._set(key, value[0] if len(value) == 1 else tuple(value))
        else:
            self._set(field, value, key)

    def _set(self, field: str, value: object, key: str | None = None) -> None:
        self.fields[field] = value
        self.origins[field] = (key or field,)

    def _second_spelling(self, key: str, field: str) -> Iterator[Finding]:
        """Rotary positions that were stretched leave the papers' key at the longer length."""
        value, first = self.data[key], self.data[field]
        if value != first and self.data.get("rope_scaling") is None:
            yield Finding((key,), f"is {show(value)}, but {field} is {show(first)}")

    def _family_key(self, key: str, value: object) -> Iterator[Finding]:
        family = self.data.get("model_type", "llama")
        if family not in FAMILIES:
            if key == "model_type":
                known = ", ".join(show(name) for name in FAMILIES)
                yield Finding(
                    (key,), f"is {show(value)}, which is not supported: it must be one of {known}"
                )
        elif key == "architectures":
            names = FAMILIES[str(family)]
            if value is not None and (
                not isinstance(value, list) or any(name not in names for name in value)
            ):
                yield Finding((key,), f'is {show(value)}, but must be ["{names[0]}"]')
        elif key == "bias":
            if family == "internlm":
                self._set("attention_bias", value, key)
            elif value is not False:
                yield Finding((key,), f"is {show(value)}: write attention_bias and mlp_bias")
        elif family == "mistral":
            # what the file leaves out has that family's defaults
            if "sliding_window" in self.data:
                self.fields.setdefault("num_key_value_heads", 8)
            else:
                yield Finding(
                    (key,),
                    'is "mistral", whose attention has a sliding window unless the file says '
                    "sliding_window: null; windows are not supported",
                )

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
        name = "type" if block.get("rope_type") is None else "rope_type"
        kind = block.get(name)
        if kind not in ("default", None, *_ROPES):
            known = ", ".join(show(name) for name in ("default", *_ROPES))
            message = f"is {show(kind)}, which is not supported: it must be one of {known}"
            yield Finding((key, name), message)
            # the other keys are this type's settings
            return
        settings = {}
        for other in sorted(block.keys() - {"rope_theta", "rope_type", "type"}):
            if other in ROPE_NEUTRAL and block[other] in ROPE_NEUTRAL[other]:
                continue
            if kind in ("default", None) and block[other] is not None:
                message = f'is {show(block[other])}, but rope_type "default" has no such key'
                yield Finding((key, other), message)
            elif block[other] is not None:
                settings[other] = block[other]
        if kind in _ROPES:
            yield from self._scaling(key, kind, settings)

    def _scaling(self, key: str, kind: str, settings: dict[str, Any]) -> Iterator[Finding]:
        """Set the field from a block's own keys, with what transformers fills in."""
        length = self.data.get("max_position_embeddings", 2048)
        original = self.data.get("original_max_position_embeddings")
        if kind != "linear" and (original or length) is not None:
            settings.setdefault("original_max_position_embeddings", original or length)
        before = settings.get("original_max_position_embeddings")
        if kind == "yarn" and _is_count(length) and _is_count(before):
            settings.setdefault("factor", length / before)
        settings = {"rope_type": kind, **settings}
        try:
            scaling = _ROPES[kind].model_validate(settings)
        except ValidationError as error:
            for path, message in explain(error, settings, _ROPES[kind]):
                yield Finding((key, *path), message)
            return
        if self.fields.setdefault("rope_scaling", scaling) != scaling:
            first = self.origins["rope_scaling"][0]
            yield Finding((key,), f"says something else than {first}: remove one")
        self.origins.setdefault("rope_scaling", (key,))

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


def _eos_is_in_vocabulary(
    eos_token_id: int | tuple[int, ...] | None, vocab_size: int
) -> Iterator[Finding]:
    several = eos_token_id if isinstance(eos_token_id, tuple) else (eos_token_id,)
    for token in several:
        yield from _in_vocabulary("eos_token_id", token, vocab_size)


def _pad_is_in_vocabulary(pad_token_id: int | None, vocab_size: int) -> Iterator[Finding]:
    yield from _in_vocabulary("pad_token_id", pad_token_id, vocab_size)


def _in_vocabulary(key: str, token: int | None, vocab_size: int) -> Iterator[Finding]:
    if token is not None and token >= vocab_size:
        yield Finding((key,), f"is {token}, but must be less than vocab_size ({vocab_size})")


def _frequencies_are_finite(
    rope_scaling: RopeScaling | None, rope_theta: float
) -> Iterator[Finding]:
    if isinstance(rope_scaling, Llama3Rope):
        low, high = rope_scaling.low_freq_factor, rope_scaling.high_freq_factor
        if high <= low:
            yield Finding(
                ("rope_scaling",),
                f"has the high_freq_factor {high}, which must be more than its low_freq_factor "
                f"({low})",
            )
    if isinstance(rope_scaling, YarnRope) and rope_theta <= 1:
        yield Finding(("rope_theta",), f"is {rope_theta}, but must be more than 1 for yarn")


_RULES = (
    _frequencies_are_finite,
    _groups_divide_heads,
    _head_is_even,
    _bos_is_in_vocabulary,
    _eos_is_in_vocabulary,
    _pad_is_in_vocabulary,
)
