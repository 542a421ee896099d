"""A checkpoint as an adapter that `peft` loads, with its base model beside it.

OUTPUT/
      adapter_config.json, adapter_model.safetensors    factors of every projection
      base/                                             a Hugging Face directory: frozen weights,
                                                        and all else as it was trained
      README.md                                         the model card
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import card_of, described
from relora_ds.errors import CheckpointError
from relora_ds.files.durable import write_file
from relora_ds.files.tensors import stream_safetensors
from relora_ds.methods.build import DenseWeights
from relora_ds.methods.interface import Adapter
from relora_ds.model.hf.directory import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASE,
    METADATA,
    SHARD_BYTES,
    fill_hf,
    new_export,
    write_texts,
)

_PREFIX = "base_model.model."


def export_peft(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype | None,
    *,
    with_tokenizer: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the adapters of a checkpoint and their base model.

    Of ReLoRA these are the adapters since the last merge, and the base with all merges so far.

    Args:
        checkpoint: of a method whose projections are a frozen weight with an adapter.
        output: directory to write.
        dtype: what all tensors are stored in; None for fp32.
        with_tokenizer: whether the checkpoint's tokenizer goes with the base.
        shard_bytes: largest size of one file of the base.

    Raises:
        CheckpointError: the checkpoint cannot be read, has no adapters, or they are not finite.
        ConfigError: the output directory is taken.
        DataError: the tokenizer cannot be read.
    """
    model, dtype = DenseModel(checkpoint), dtype or torch.float32
    weights = model.weights()
    if not isinstance(weights, DenseWeights):
        raise CheckpointError(
            f"{checkpoint} is a Hugging Face directory, which holds no adapters: name a checkpoint "
            "of a run with method lora, relora or switchlora"
        )
    parts = _Parts(weights)
    tokenizer, architecture = described(model, with_tokenizer)
    with new_export(output) as work:
        factors = parts.factors(dtype)
        write_file(work / ADAPTER, lambda file: stream_safetensors(file, factors, METADATA))
        base = work / BASE
        base.mkdir()
        fill_hf(base, architecture, parts.items(), tokenizer, dtype, shard_bytes)
        config = json.dumps(parts.config(output / BASE), indent=2) + "\n"
        write_texts(work, {**card_of(model, dtype), ADAPTER_CONFIG: config})


class _Parts(Mapping[str, torch.Tensor]):
    """The base model's weights by name, fp32, read on access; and the adapters apart.

    Raises:
        CheckpointError: the method has no adapters.
    """

    def __init__(self, weights: DenseWeights) -> None:
        self._weights = weights
        self._adapted = [name for name in weights if weights.is_projection(name)]
        self._first = self._adapter(self._adapted[0])

    def __getitem__(self, name: str) -> torch.Tensor:
        adapted = self._weights.is_projection(name)
        return self._adapter(name).base if adapted else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def factors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Both factors of every projection by the names that `peft` gives them."""
        found: dict[str, torch.Tensor] = {}
        for name in self._adapted:
            adapter, stem = self._adapter(name), _PREFIX + name.removesuffix(".weight")
            for factor, value in (("lora_A", adapter.lora_a), ("lora_B", adapter.lora_b)):
                if not bool(torch.isfinite(value).all()):
                    raise CheckpointError(
                        f"{name}: {factor} holds values that are not finite: the model diverged "
                        "before it was saved, and is not exported; use an earlier checkpoint"
                    )
                found[f"{stem}.{factor}.weight"] = value.to(dtype)
        return found

    def config(self, base: Path) -> dict[str, Any]:
        """Contents of `adapter_config.json`.

        Args:
            base: where the base model will be.
        """
        rank = len(self._first.lora_a)
        modules = {name.removesuffix(".weight").rpartition(".")[2] for name in self._adapted}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": rank,
            "lora_alpha": self._first.scale * rank,  # peft scales by lora_alpha / r
            "lora_dropout": 0.0,
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "inference_mode": True,
        }

    def _adapter(self, name: str) -> Adapter:
        return self._weights.adapter(name)
