"""Reading and writing model directories in Hugging Face's layout.

The tensors carry the dense model's names and shapes (`init.dense_shapes`). Nothing here needs the
transformers package; what is written loads in its versions 4 and 5.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from relora_ds.config.architecture import read_model_config
from relora_ds.config.model import ModelConfig
from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.files.durable import (
    describe,
    exchange,
    remedy,
    sync_directory,
    sync_tree,
    write_file,
)
from relora_ds.files.regular import open_regular, read_regular
from relora_ds.files.scratch import remove_leftovers, scratch_folder
from relora_ds.files.tensors import stream_safetensors
from relora_ds.model.hf_tokenizer import write_tokenizer
from relora_ds.model.init import dense_shapes

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000
_INDEX_BYTES = 64 << 20
# "format" is what transformers looks for; "producer" tells our exports from a model of the user's
_METADATA = {"format": "pt", "producer": "relora_ds"}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_NEW, _OLD = "new", "old"  # in the scratch folder: the export, and the one that it replaces
_LISTED = 8  # names shown in an error


def write_hf(
    directory: str | Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    tokenizer_path: Path | None,
    dtype: torch.dtype,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a model that `transformers.AutoModelForCausalLM.from_pretrained(directory)` loads.

    The directory appears complete or not at all; an earlier export in its place is replaced.

    Args:
        directory: target; must not exist, be empty, or hold an export of ours.
        config: architecture.
        weights: every (name, tensor) of the dense model, any order, device and float dtype.
            Consumed one by one; at most one shard is held in memory.
        tokenizer_path: SentencePiece model to go with it, or None.
        dtype: fp32, bf16 or fp16; what the tensors are stored in.
        shard_bytes: largest size of one file, unless a single tensor is larger.

    Raises:
        ConfigError: the target is taken, or `dtype` cannot be stored.
        CheckpointError: a tensor is missing, unexpected, repeated, of the wrong shape or not
            finite; or the directory cannot be written.
        DataError: the tokenizer cannot be exported.
    """
    target = Path(directory).resolve()
    if dtype not in _DTYPES:
        raise ConfigError(f"an export cannot be stored as {dtype}; use fp32, bf16 or fp16")
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore_interrupted(target)
        with scratch_folder(target.parent, f".{target.name}.") as scratch:
            work = scratch / _NEW
            work.mkdir()
            _dump(_config_json(config, dtype), work / "config.json")
            _dump(_generation_json(config), work / "generation_config.json")
            if tokenizer_path is not None:
                write_tokenizer(Path(tokenizer_path), work)
            _write_weights(work, _checked(weights, dense_shapes(config)), dtype, shard_bytes)
            sync_tree(work)
            _publish(work, target)
    except OSError as error:
        raise CheckpointError(
            f"the export to {target} cannot be written: {describe(error)}; {remedy(error)}"
        ) from error


def read_hf(directory: str | Path) -> tuple[ModelConfig, HfWeights]:
    """Open a LLaMA model directory; tensors are read when they are asked for.

    Raises:
        ConfigError: `config.json` is missing or describes something else than a LLaMA.
        CheckpointError: there is no safetensors file, it is damaged, or its tensors are not those
            of the configuration.
    """
    directory = Path(directory)
    config = read_model_config(directory / "config.json")
    return config, HfWeights(directory, dense_shapes(config))


class HfWeights(Mapping[str, torch.Tensor]):
    """The tensors of a model directory by name, in the model's order, each read on access (CPU).

    Args:
        directory: holds `model.safetensors`, or shards and their index.
        shapes: what is expected, by name. Rotary tables of old exports and a stored copy of a tied
            head are not counted as unexpected.

    Raises:
        CheckpointError: see `read_hf`; every missing, unexpected or misshapen tensor is named.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._names = list(shapes)
        self._file_of: dict[str, Any] = {}
        for path in _weight_files(directory):
            file = _open(path)
            self._file_of.update(dict.fromkeys(file.keys(), file))
        found = {name: _shape(file, name) for name, file in self._file_of.items()}
        tied = "lm_head.weight" not in shapes
        for name in list(found):
            if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                del found[name]
        problems = _differences(found, shapes)
        if problems:
            raise CheckpointError(
                f"{directory} does not fit its config.json: {'; '.join(problems)}. "
                "Use the config.json that was saved with these weights"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Both spellings where transformers 5 renamed a key: each version ignores the other's."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config.model_dump(),
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": _DTYPES[dtype],
        "dtype": _DTYPES[dtype],
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
    problems = _differences(found, shapes)
    if problems:
        raise CheckpointError(
            f"the weights to export are not those of the configuration: {'; '.join(problems)}"
        )


def _differences(
    found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is wrong with `found`, one phrase per kind of problem."""
    wrong = [
        f"{name} {found[name]} instead of {shapes[name]}"
        for name in shapes
        if name in found and found[name] != shapes[name]
    ]
    kinds = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of another shape": wrong,
    }
    return [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _write_weights(
    directory: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """One file, or numbered shards with an index as soon as one file would exceed `shard_bytes`."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}"
        write_file(path, lambda file: stream_safetensors(file, pending, _METADATA))
        shards.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        grown = tensor.numel() * dtype.itemsize
        if pending and size + grown > shard_bytes:
            flush()
            size = 0
        # a copy of its own: the caller may fill the same buffer with the next tensor
        pending[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
        total, size = total + grown, size + grown
    flush()

    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = [_SINGLE]
    for i, file in enumerate(files):
        os.replace(directory / f"shard-{i}", directory / file)
    if count > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        _dump({"metadata": {"total_size": total}, "weight_map": weight_map}, directory / _INDEX)


def check_target(target: Path) -> None:
    """Make sure that an export may be written to a directory.

    Raises:
        ConfigError: something else is there.
    """
    if not target.exists() or _is_export(target):
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ConfigError(
            f"{target} exists and is not an earlier export; name a new directory or remove it"
        )


def _is_export(target: Path) -> bool:
    """Whether the directory holds weights that `write_hf` wrote."""
    for path in sorted(target.glob("model*.safetensors")) if target.is_dir() else ():
        try:
            return (_open(path).metadata() or {}).get("producer") == _METADATA["producer"]
        except CheckpointError:
            return False
    return False


def _publish(work: Path, target: Path) -> None:
    """Put the finished directory in place of whatever `_check_target` allowed to stand there."""
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
    for old in sorted(target.parent.glob(f".{target.name}.*/{_OLD}")):
        if not target.exists() and _is_export(old):
            os.replace(old, target)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index = directory / _INDEX
    try:
        names = set(json.loads(read_regular(index, _INDEX_BYTES))["weight_map"].values())
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; weights in another format "
            "(such as pytorch_model.bin) must be saved as safetensors first"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error}); copy the model again") from error
    odd = [
        name
        for name in names
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..")
    ]
    if odd:
        raise CheckpointError(
            f"{index} names {odd[0]!r}, which is no file beside it; copy the model again"
        )
    return sorted(directory / name for name in names)


def _open(path: Path) -> Any:
    try:
        open_regular(path).close()
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); copy the model again"
        ) from error


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file.get_slice(name).get_shape())


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
