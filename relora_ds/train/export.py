"""From a checkpoint to the dense model, for evaluation, initialisation and export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.source import read_yaml
from relora_ds.engine.shards import read_parameters
from relora_ds.methods.registry import plan_phases
from relora_ds.model.hf import read_hf, write_hf
from relora_ds.parallel.shape import TensorShard
from relora_ds.train.build import dense_weights, tensor_shards
from relora_ds.train.checkpoint import find_checkpoint, read_trainer_state
from relora_ds.train.manifest import verify_manifest


class DenseModel:
    """The dense model in a checkpoint of ours or in a Hugging Face directory.

    Args:
        path: `step_N`, a directory that holds `latest`, a run directory, or an HF directory.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Path | None
        """SentencePiece model, if one is there."""
        self.seq_length: int | None = None
        """What the run trained on; an HF directory does not say."""
        if (path / "config.json").is_file():
            self.architecture, self._hf = read_hf(path)
            directory = path
        else:
            self._hf = None
            directory = self._checkpoint = find_checkpoint(path)
            verify_manifest(directory)
            self.architecture = ModelConfig.model_validate_json(
                (directory / "model.json").read_text()
            )
            self._config = RunConfig.model_validate_json(
                json.dumps(read_yaml(directory / "run.yaml").data)
            )
            self.seq_length = self._config.train.seq_length
        tokenizer = directory / "tokenizer.model"
        self.tokenizer = tokenizer if tokenizer.is_file() else None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by its Hugging Face name, fp32 on the CPU."""
        if self._hf is not None:
            for name, value in self._hf.items():
                yield name, value.float()
            return
        state = read_trainer_state(self._checkpoint)
        phase = next(phase for phase in plan_phases(self._config) if phase.name == state.phase)
        train = self._config.train
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        values: Mapping[str, torch.Tensor]
        if state.tensor_size == 1:
            values = read_parameters(self._checkpoint, dtype, 0)
        else:
            values = join_parts(
                [read_parameters(self._checkpoint, dtype, r) for r in range(state.tensor_size)],
                [
                    tensor_shards(self.architecture, phase.method, train, r, state.tensor_size)
                    for r in range(state.tensor_size)
                ],
            )
        yield from dense_weights(self.architecture, phase.method, train, values)


def join_parts(
    parts: Sequence[Mapping[str, torch.Tensor]], shards: Sequence[Mapping[str, TensorShard]]
) -> dict[str, torch.Tensor]:
    """Whole parameters from those of every tensor-parallel rank.

    Args:
        parts: by name, one mapping per rank. What is not a parameter is left out: buffers follow
            from the parameters' shapes and the seed.
        shards: which part of the whole each one is; what is not among them is whole already.
    """
    joined = {}
    for name, first in parts[0].items():
        if name in shards[0]:
            joined[name] = first.new_empty(shards[0][name].whole)
            for part, own in zip(parts, shards, strict=True):
                own[name].place(part[name], joined[name])
        elif first.is_floating_point():
            joined[name] = first
    return joined


def export_hf(checkpoint: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the dense model of a checkpoint as a Hugging Face directory.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the output directory is taken.
    """
    model = DenseModel(checkpoint)
    write_hf(output, model.architecture, model.weights(), model.tokenizer, dtype)
