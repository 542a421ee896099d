"""A checkpoint's dense model as a directory in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import torch

from relora_ds.checkpoint.export.card import card_files, results_of
from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.config.model import ModelConfig
from relora_ds.data.tokenizer import special_ids
from relora_ds.model.hf.directory import SHARD_BYTES, write_hf


def export_hf(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype | None,
    *,
    with_tokenizer: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the dense model of a checkpoint as a Hugging Face directory, with a model card.

    Args:
        checkpoint: anything that `DenseModel` reads; of a model that was made elsewhere nothing is
            known that a card could say.
        output: directory to write.
        dtype: what the tensors are stored in; None for fp32 of a run's, and for what a model that
            was made elsewhere is kept in.
        with_tokenizer: whether the checkpoint's tokenizer goes with them.
        shard_bytes: largest size of one file.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the output directory is taken.
        DataError: the tokenizer cannot be read.
    """
    model = DenseModel(checkpoint)
    tokenizer, architecture = described(model, with_tokenizer)
    texts = card_of(model, dtype or torch.float32)
    weights = model.weights() if dtype is not None else model.stored_weights()
    write_hf(output, architecture, weights.items(), tokenizer, dtype, shard_bytes, texts)


def described(model: DenseModel, with_tokenizer: bool) -> tuple[Path | None, ModelConfig]:
    """The tokenizer that goes with a model, and the architecture with its ids."""
    tokenizer = model.tokenizer if with_tokenizer else None
    if tokenizer is None:
        return None, model.architecture
    return tokenizer, with_ids_of(tokenizer, model.architecture)


def card_of(model: DenseModel, dtype: torch.dtype) -> dict[str, str]:
    """Files of the model card by name; none of a model that was made elsewhere."""
    if model.saved is None or model.saved.is_import:
        return {}
    results = results_of(model.saved.checkpoint, model.saved.record.trainer.step)
    return card_files(model.saved.record, results, str(dtype).removeprefix("torch."))


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
