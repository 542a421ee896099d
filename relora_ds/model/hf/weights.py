"""Reading model directories in Hugging Face's layout: safetensors, or torch's own files.

The tensors carry the dense model's names and shapes (`init.dense_shapes`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from relora_ds.config.architecture import read_model_config
from relora_ds.config.model import ModelConfig
from relora_ds.errors import CheckpointError
from relora_ds.files.regular import open_regular, read_regular
from relora_ds.files.unpickled import check_archive, check_tensor
from relora_ds.model.init import dense_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TORCH_SINGLE = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_INDEX_BYTES = 64 << 20
_ARCHIVE = b"PK\x03\x04"  # what torch tells its formats apart by
_LISTED = 8  # names shown in an error


class _File(Protocol):
    """Tensors of one file by name."""

    def keys(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


def read_hf(directory: str | Path) -> tuple[ModelConfig, HfWeights]:
    """Open a LLaMA model directory; tensors are read when they are asked for.

    Raises:
        ConfigError: `config.json` is missing or describes something else than a LLaMA.
        CheckpointError: there is no file of weights, it is damaged, or its tensors are not those of
            the configuration.
    """
    directory = Path(directory)
    config = read_model_config(directory / "config.json")
    return config, HfWeights(directory, dense_shapes(config))


class HfWeights(Mapping[str, torch.Tensor]):
    """The tensors of a model directory by name, in the model's order, each read on access (CPU).

    Args:
        directory: holds `model.safetensors` or `pytorch_model.bin`, or shards and their index.
        shapes: what is expected, by name. Rotary tables of old exports and a stored copy of a tied
            head are not counted as unexpected.

    Raises:
        CheckpointError: see `read_hf`; every missing, unexpected or misshapen tensor is named.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._names = list(shapes)
        self._file_of: dict[str, _File] = {}
        for path in _weight_files(directory):
            file = _TorchFile(path) if path.suffix == ".bin" else _SafetensorsFile(path)
            self._file_of.update(dict.fromkeys(file.keys(), file))
        found = {name: file.shape(name) for name, file in self._file_of.items()}
        tied = "lm_head.weight" not in shapes
        for name in list(found):
            if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                del found[name]
        problems = tensor_differences(found, shapes)
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


def tensor_differences(
    found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is wrong with the shapes in `found`, one phrase per kind of problem.

    Args:
        found: shapes by name.
        shapes: those that are expected.
    """
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


def open_safetensors(path: Path) -> Any:
    """A file of tensors, of which the header has been read.

    Raises:
        CheckpointError: it cannot be read, or is no safetensors file.
    """
    try:
        open_regular(path).close()
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); copy the model again"
        ) from error


class _SafetensorsFile:
    """A file whose tensors are read one by one."""

    def __init__(self, path: Path) -> None:
        self._file = open_safetensors(path)

    def keys(self) -> Iterable[str]:
        return self._file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


class _TorchFile:
    """A file of torch's own format, of which nothing but tensors is understood: no code runs."""

    def __init__(self, path: Path) -> None:
        try:
            tensors = _load(path)
        except Exception as error:  # there is no end to what a damaged file makes its readers raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
            raise CheckpointError(
                f"{path} cannot be read as tensors and nothing else ({reason}); save the model as "
                "safetensors, or copy it again"
            ) from error
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in tensors.items()
        ):
            raise CheckpointError(
                f"{path} holds something else than tensors by name; save the model with "
                "transformers' save_pretrained"
            )
        try:
            for tensor in tensors.values():
                check_tensor(tensor)
        except ValueError as error:
            raise CheckpointError(f"{path} {error}; save the model as safetensors") from error
        self._tensors = cast(dict[str, torch.Tensor], tensors)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _load(path: Path) -> object:
    with open_regular(path) as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
    if is_archive:
        check_archive(path.resolve())
    # the format before torch 1.6 is no archive, and cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, safetensors where there are both."""
    for single, index in ((SINGLE, INDEX), (_TORCH_SINGLE, _TORCH_INDEX)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).exists():
            return _shards(directory, directory / index)
    raise CheckpointError(
        f"{directory} holds neither {SINGLE} nor {_TORCH_SINGLE}, nor an index of shards; copy the "
        "model again, or save it with transformers' save_pretrained"
    )


def _shards(directory: Path, index: Path) -> list[Path]:
    try:
        names = set(json.loads(read_regular(index, _INDEX_BYTES))["weight_map"].values())
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
