"""A checkpoint's dense model as a directory in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.config.model import ModelConfig
from relora_ds.data.tokenizer import special_ids
from relora_ds.model.hf.directory import write_hf


def export_hf(
    checkpoint: Path, output: Path, dtype: torch.dtype, *, with_tokenizer: bool = True
) -> None:
    """Write the dense model of a checkpoint as a Hugging Face directory.

    Args:
        checkpoint: anything that `DenseModel` reads.
        output: directory to write.
        dtype: what the tensors are stored in.
        with_tokenizer: whether the checkpoint's tokenizer goes with them.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the output directory is taken.
        DataError: the tokenizer cannot be read.
    """
    model = DenseModel(checkpoint)
    tokenizer = model.tokenizer if with_tokenizer else None
    architecture = model.architecture
    if tokenizer is not None:
        architecture = with_ids_of(tokenizer, architecture)
    write_hf(output, architecture, model.weights().items(), tokenizer, dtype)


def with_ids_of(tokenizer: Path, architecture: ModelConfig) -> ModelConfig:
    """An architecture whose special ids are the tokenizer's, which the data were written with.

    Of several ids that end a text all stay, if the tokenizer's is among them.
    """
    ids, ends = special_ids(tokenizer), architecture.eos_token_id
    kept = isinstance(ends, tuple) and ids.eos in ends
    return architecture.model_copy(
        update={
            "bos_token_id": ids.bos,
            "eos_token_id": ends if kept else ids.eos,
            "pad_token_id": ids.pad,
        }
    )
