"""From a checkpoint to the dense model, for evaluation, initialisation and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.source import read_yaml
from relora_ds.engine.shards import is_cut, read_cut_parameters
from relora_ds.errors import CheckpointError
from relora_ds.methods.registry import plan_phases
from relora_ds.model.hf import read_hf, write_hf
from relora_ds.train.build import dense_weights
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
        phase_name = read_trainer_state(self._checkpoint).phase
        phase = next(phase for phase in plan_phases(self._config) if phase.name == phase_name)
        values = _module_values(self._checkpoint, self._config.train.precision)
        yield from dense_weights(self.architecture, phase.method, self._config.train, values)


def export_hf(checkpoint: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the dense model of a checkpoint as a Hugging Face directory.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the output directory is taken.
    """
    model = DenseModel(checkpoint)
    write_hf(output, model.architecture, model.weights(), model.tokenizer, dtype)


def _module_values(checkpoint: Path, precision: str) -> dict[str, torch.Tensor]:
    """The model's parameters as the forward pass used them.

    They are taken from the module's state: DeepSpeed's own converter leaves out frozen weights at
    stage 1. Only tensors and plain containers are unpickled.
    """
    if is_cut(checkpoint):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return read_cut_parameters(checkpoint, dtype)
    path = checkpoint / "mp_rank_00_model_states.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another one") from error
    return state["module"]
