"""Writing model directories in Hugging Face's layout.

The tensors carry the dense model's names and shapes (`init.dense_shapes`). Nothing here needs the
transformers package; what is written loads in its versions 4 and 5.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from relora_ds.config.model import ModelConfig
from relora_ds.data.json_tokenizer import COMPANIONS
from relora_ds.data.json_tokenizer import NAME as JSON_TOKENIZER
from relora_ds.data.tokenizer import NAME as TOKENIZER
from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.files.durable import (
    describe,
    exchange,
    remedy,
    sync_directory,
    sync_tree,
    write_file,
)
from relora_ds.files.scratch import remove_leftovers, scratch_folder
from relora_ds.files.tensors import stream_safetensors
from relora_ds.model.hf.tokenizer import write_tokenizer
from relora_ds.model.hf.weights import INDEX, SINGLE, open_safetensors, tensor_differences
from relora_ds.model.hf.written import NAME as RECORD
from relora_ds.model.hf.written import Written
from relora_ds.model.init import dense_shapes

SHARD_BYTES = 5_000_000_000
"""Largest file of an export, as Hugging Face writes them."""
METADATA = {"format": "pt", "producer": "relora_ds"}
"""Of every file of tensors: `format` is what transformers looks for, `producer` tells our exports
from a model of the user's."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What weights may be stored in, by the name that `config.json` has for it."""
_NEW, _OLD = "new", "old"  # in the scratch folder: the export, and the one that it replaces
BASE = "base"
"""Folder of an adapter's base model within an export."""
CARD = "README.md"
RUN, ZERO = "training_run.yaml", "training_zero.json"
"""The run that trained a model, and its DeepSpeed settings, beside its card."""
CONFIG, ADAPTER_CONFIG, GENERATION = "config.json", "adapter_config.json", "generation_config.json"
ADAPTER = "adapter_model.safetensors"
_NAMES = {RECORD, CARD, RUN, ZERO, CONFIG, ADAPTER_CONFIG, GENERATION, ADAPTER, SINGLE, INDEX}
_NAMES |= {TOKENIZER, JSON_TOKENIZER, *COMPANIONS}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def write_hf(
    directory: str | Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    tokenizer_path: Path | None,
    dtype: torch.dtype | None,
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a model that `transformers.AutoModelForCausalLM.from_pretrained(directory)` loads.

    The directory appears complete or not at all; an earlier export in its place is replaced, unless
    it holds files that no export writes, or that were edited since.

    Args:
        directory: target; must not exist, be empty, or hold an export of ours.
        config: architecture.
        weights: every (name, tensor) of the dense model, any order, device and float dtype.
            Consumed one by one; at most one shard is held in memory.
        tokenizer_path: SentencePiece model to go with it, or None.
        dtype: fp32, bf16 or fp16; what the tensors are stored in. None keeps each tensor's own.
        shard_bytes: largest size of one file, unless a single tensor is larger.
        texts: contents of the card's files by name.

    Raises:
        ConfigError: the target is taken, or `dtype` cannot be stored.
        CheckpointError: a tensor is missing, unexpected, repeated, of the wrong shape or not
            finite; or the directory cannot be written.
        DataError: the tokenizer cannot be exported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"an export cannot be stored as {dtype}; use fp32, bf16 or fp16")
    with new_export(Path(directory)) as work:
        fill_hf(work, config, weights, tokenizer_path, dtype, shard_bytes)
        write_texts(work, texts or {})


@contextmanager
def new_export(directory: Path) -> Iterator[Path]:
    """An empty folder to fill with an export, which becomes `directory` at the end of the block.

    Raises:
        ConfigError: something that is no export of ours is there, or lies in an export.
        CheckpointError: a file cannot be written.
    """
    target = directory.resolve()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore_interrupted(target)
        with scratch_folder(target.parent, f".{target.name}.") as scratch:
            work = scratch / _NEW
            work.mkdir()
            yield work
            assert not _strangers(work), "what an export writes is known by its name"
            (work / RECORD).write_bytes(Written.found_in(work).dump())
            sync_tree(work)
            check_target(target)  # again: writing takes minutes, and what is there is removed
            _publish(work, target)
    except OSError as error:
        raise CheckpointError(
            f"the export to {target} cannot be written: {describe(error)}; {remedy(error)}"
        ) from error


def fill_hf(
    folder: Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    tokenizer_path: Path | None,
    dtype: torch.dtype | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write configuration, weights and tokenizer into an empty folder; see `write_hf`."""
    _dump(_generation_json(config), folder / GENERATION)
    if tokenizer_path is not None:
        write_tokenizer(Path(tokenizer_path), folder)
    checked = _checked(weights, dense_shapes(config))
    stored = _write_weights(folder, checked, dtype, shard_bytes)
    _dump(_config_json(config, stored), folder / CONFIG)


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files by name."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Both spellings where transformers 5 renamed a key: each version ignores the other's."""
    fields = config.model_dump(exclude={"rope_scaling"})
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.model_dump(exclude_none=True)
        fields["rope_scaling"] = scaling
        rope |= scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": DTYPES[dtype],
        "dtype": DTYPES[dtype],
    }


def _generation_json(config: ModelConfig) -> dict[str, Any]:
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True, **{key: i for key, i in ids.items() if i is not None}}


def _checked(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors on; a wrong one ends the stream, and so does an end that comes too early."""
    seen: dict[str, tuple[int, ...]] = {}
    for name, tensor in weights:
        if name in seen:
            raise CheckpointError(f"tensor {name} was given twice to the export; give it once")
        seen[name] = tuple(tensor.shape)
        expected = {name: shapes[name]} if name in shapes else {}
        _raise_unless_same({name: seen[name]}, expected)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} holds values that are not finite: the model diverged before it was "
                "saved, and is not exported; use an earlier checkpoint"
            )
        yield name, tensor
    _raise_unless_same(seen, shapes)


def _raise_unless_same(
    found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    problems = tensor_differences(found, shapes)
    if problems:
        raise CheckpointError(
            f"the weights to export are not those of the configuration: {'; '.join(problems)}"
        )


def _write_weights(
    directory: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> torch.dtype:
    """One file, or numbered shards with an index as soon as one file would exceed `shard_bytes`.

    Returns:
        The narrowest dtype that holds every tensor as it is stored.
    """
    widest: torch.dtype | None = None
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}"
        write_file(path, lambda file: stream_safetensors(file, pending, METADATA))
        shards.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        stored = dtype or tensor.dtype
        widest = stored if widest is None else torch.promote_types(widest, stored)
        grown = tensor.numel() * stored.itemsize
        if pending and size + grown > shard_bytes:
            flush()
            size = 0
        # a copy of its own: the caller may fill the same buffer with the next tensor
        pending[name] = torch.empty(tensor.shape, dtype=stored).copy_(tensor.detach())
        total, size = total + grown, size + grown
    flush()

    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = [SINGLE]
    for i, file in enumerate(files):
        os.replace(directory / f"shard-{i}", directory / file)
    if count > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        _dump({"metadata": {"total_size": total}, "weight_map": weight_map}, directory / INDEX)
    assert widest is not None  # a model has weights
    return widest


def check_target(target: Path) -> None:
    """Make sure that an export may be written to a directory.

    Raises:
        ConfigError: something else is there, or somebody's files lie in an earlier export, or were
            edited in there.
    """
    if not target.exists():
        return
    if _is_export(target):
        strangers, why = _strangers(target), "which no export writes"
        if not strangers:
            strangers = Written.recorded_in(target).edited_in(target)
            why = "which was edited since"
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise ConfigError(
                f"{target} is an earlier export, which a new one replaces as a whole, but holds "
                f"{strangers[0]}{more}, {why}: move it elsewhere, or name a new directory"
            )
    elif not target.is_dir() or any(target.iterdir()):
        raise ConfigError(
            f"{target} exists and is not an earlier export; name a new directory or remove it"
        )


def _strangers(export: Path) -> list[str]:
    """What lies in an export and is not of it, by its path in there, sorted."""
    found: list[str] = []
    for path in export.iterdir():
        if path.name == BASE and path.is_dir():
            found += [f"{BASE}/{name}" for name in _strangers(path)]
        elif (path.name not in _NAMES and _SHARD.fullmatch(path.name) is None) or path.is_dir():
            found.append(path.name)
    return sorted(found)


def _is_export(target: Path) -> bool:
    """Whether the directory holds weights that we wrote, of a model or of an adapter."""
    for path in sorted(target.glob("*model*.safetensors")) if target.is_dir() else ():
        try:
            metadata = open_safetensors(path).metadata() or {}
        except CheckpointError:
            return False
        return metadata.get("producer") == METADATA["producer"]
    return False


def _publish(work: Path, target: Path) -> None:
    """Put the finished directory in place of whatever `check_target` allowed to stand there."""
    if target.exists() and not exchange(work, target):
        # a directory that is not empty cannot be replaced in one step; keep it until the new stands
        os.replace(target, work.with_name(_OLD))
    if work.exists() and not target.exists():
        os.replace(work, target)
    sync_directory(target.parent)


def recover_export(target: Path) -> None:
    """Undo what a killed export left beside its target: an earlier export goes back to its place,
    scratch folders of processes that are gone are removed.

    Raises:
        OSError: the earlier export cannot be moved.
    """
    _restore_interrupted(target)
    remove_leftovers(target.parent, f".{target.name}.")


def _restore_interrupted(target: Path) -> None:
    """Put back the export that a process had moved away when it was killed."""
    for old in sorted(target.parent.glob(f".{glob.escape(target.name)}.*/{_OLD}")):
        if not target.exists() and _is_export(old):
            os.replace(old, target)


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
