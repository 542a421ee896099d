"""A saved model as a directory that libraries of Hugging Face's load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import export_hf
from relora_ds.data.tokenizer import AnyTokenizer, open_tokenizer
from relora_ds.errors import ConfigError, DataError


@contextmanager
def as_directory(path: Path) -> Iterator[Path]:
    """The Hugging Face directory of a model, which exists while the block runs.

    Args:
        path: such a directory, or a checkpoint, of which an fp32 export is made meanwhile.

    Raises:
        CheckpointError: the model cannot be read, or has no dense weights.
    """
    if (path / "config.json").is_file():
        yield path
        return
    with TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        export_hf(path, model, torch.float32)
        yield model


def tokenizer_of(model: DenseModel) -> AnyTokenizer:
    """The tokenizer that was saved with a model.

    Raises:
        ConfigError: there is none.
        DataError: it cannot be read, or has more ids than the model.
    """
    if model.tokenizer is None:
        raise ConfigError(
            f"{model.path} holds no tokenizer: put the tokenizer.model or tokenizer.json that the "
            f"data were prepared with into {model.directory}"
        )
    tokenizer, ids = open_tokenizer(model.tokenizer), model.architecture.vocab_size
    if tokenizer.vocab_size > ids:
        raise DataError(
            f"{model.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, but the model's "
            f"vocab_size is {ids}: put the tokenizer there that the data were prepared with"
        )
    return tokenizer
