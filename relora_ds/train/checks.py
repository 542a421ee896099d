"""What is looked at before a run starts, and in a dry run: what it reads, and where it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from relora_ds.checkpoint.changes import check_resume
from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import with_ids_of
from relora_ds.checkpoint.resume import choose_checkpoint
from relora_ds.checkpoint.saved_run import SavedRun, open_saved_run
from relora_ds.config.checks import find_problems
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.data.source import Corpus, open_corpus
from relora_ds.data.tokenizer import open_tokenizer
from relora_ds.data.verify import verify_contents
from relora_ds.engine.accelerator import describe_arithmetic
from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.model.hf.tokenizer import export_obstacle
from relora_ds.train.evaluate import validation_batches
from relora_ds.train.results import check_export_target

_NO_WEIGHTS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "max_position_embeddings",
)
"""Keys of a model that say nothing about what its weights compute."""


def check_start(config: RunConfig, architecture: ModelConfig) -> list[str]:
    """Look at everything that a start of one process would, and change nothing.

    Args:
        config: the run.
        architecture: its model.

    Returns:
        What a user should know of it.

    Raises:
        ConfigError: there is no place for what the run writes.
        DataError: a file cannot be used, or files, tokenizer and model do not belong together.
        CheckpointError: the checkpoint to go on from, or the weights to start from, cannot be read,
            or are of another run or model.
    """
    _check_output_dir(Path(config.output_dir))
    check_export_target(config)
    checkpoint = choose_checkpoint(config)
    saved = None if checkpoint is None else open_saved_run(checkpoint)
    if saved is not None and saved.is_import:
        config, saved = begun_with(saved, config, architecture), None
    if config.data.source == "builtin":  # a start would build it, and it fits by construction
        return [] if saved is not None else list(_doubts_about_weights(config, architecture, None))
    corpus = open_corpus(config.data)
    verify_contents(corpus.files, whole=config.data.verify == "whole")
    corpus.check_vocabulary(architecture.vocab_size)
    corpus.check_length(config.train.seq_length)
    validation_batches(config, corpus)
    doubts: list[str] = []
    if saved is None:
        doubts += _doubts_about_weights(config, architecture, corpus)
    else:
        fingerprints = corpus.fingerprints(like=saved.record.trainer.data_fingerprints)
        check_resume(saved, config, architecture, fingerprints)
    return [*doubts, *doubts_about_the_export(architecture, corpus)]


def _doubts_about_weights(
    config: RunConfig, architecture: ModelConfig, corpus: Corpus | None
) -> Iterator[str]:
    model = initial_model(config, architecture, corpus)
    doubt = None if model is None else doubt_about_the_start(model, architecture)
    if doubt is not None:
        yield doubt


def _check_output_dir(path: Path) -> None:
    """Make sure that a directory can be made, or written to."""
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        state = "cannot be written to" if there.is_dir() else "is not a directory"
        raise ConfigError(f"output_dir: {there} {state}; choose one that can be written")


def begun_with(imported: SavedRun, config: RunConfig, architecture: ModelConfig) -> RunConfig:
    """A run whose `checkpoint.resume` names an import, as one that begins with its weights.

    Raises:
        ConfigError: its method does not begin with weights.
    """
    train = config.train.model_copy(update={"init_from": str(imported.checkpoint)})
    config = config.model_copy(update={"train": train})
    findings = find_problems({**dict(config), "architecture": architecture})
    if findings:
        raise ConfigError([f"checkpoint.resume {finding.message}" for finding in findings])
    return config


def initial_model(
    config: RunConfig, architecture: ModelConfig, corpus: Corpus | None
) -> DenseModel | None:
    """The model that a run starts from, of which the headers alone are read; None for none.

    Args:
        config: the run.
        architecture: its model.
        corpus: its data; None where they are not there yet.

    Raises:
        CheckpointError: it cannot be read, or its weights compute something else than the run's.
        DataError: it was trained with another tokenizer.
    """
    if config.train.init_from is None:
        return None
    model = DenseModel(Path(config.train.init_from))
    ours, theirs = architecture.model_dump(), model.architecture.model_dump()
    resizable = (*_NO_WEIGHTS, "vocab_size")
    different = [key for key in ours if ours[key] != theirs[key] and key not in resizable]
    if different:
        found = ", ".join(f"{key} {theirs[key]} instead of {ours[key]}" for key in different)
        raise CheckpointError(
            f"the model to start from, {model.path}, is another one than {config.model}: "
            f"{found}; set model={model.path} if it has a config.json, or use the same values"
        )
    if corpus is not None:
        corpus.check_tokenizer_of(model.directory)
    _check_cut(model, architecture, corpus)
    return model


def _check_cut(model: DenseModel, architecture: ModelConfig, corpus: Corpus | None) -> None:
    """Make sure that rows of a vocabulary which a run leaves out are nobody's.

    Raises:
        CheckpointError: a tokenizer has ids there, or none is known.
    """
    rows, kept = model.architecture.vocab_size, architecture.vocab_size
    if kept >= rows or corpus is None:  # data that are yet to be built have ids below `kept`
        return
    tokenizer = model.tokenizer or corpus.tokenizer
    if tokenizer is not None and open_tokenizer(tokenizer).vocab_size <= kept:
        return
    why = "no tokenizer is there to say that nobody uses them"
    if tokenizer is not None:
        why = f"{tokenizer} has {open_tokenizer(tokenizer).vocab_size} ids"
    raise CheckpointError(
        f"the model to start from, {model.path}, has a vocab_size of {rows}, but the run's model "
        f"{kept}: the rows from {kept} on would be lost, and {why}; set vocab_size to {rows}, or "
        "name the tokenizer"
    )


def doubt_about_the_start(model: DenseModel, architecture: ModelConfig) -> str | None:
    """What becomes of a vocabulary of another size than the run's; None where it is the same."""
    rows, wanted = model.architecture.vocab_size, architecture.vocab_size
    if rows == wanted:
        return None
    end = "are left out" if wanted < rows else "begin as the mean of the rows that are there"
    first, last = sorted((rows, wanted))
    return (
        f"{model.path} has a vocab_size of {rows}, but the run's model {wanted}: rows {first} to "
        f"{last - 1} of embedding and head {end}"
    )


def doubt_about_the_resume(
    saved: SavedRun, device: torch.device, compiled: bool = False, padded: bool = False
) -> str | None:
    """Why a resumed run is not bit for bit the one that was interrupted; None if nothing is known.

    Args:
        saved: the checkpoint to go on from.
        device: what this process computes on.
        compiled: whether torch's compiler makes the kernels of its layers.
        padded: whether it computes MLPs at padded widths.
    """
    before = saved.record.trainer.arithmetic
    now = describe_arithmetic(device, compiled, padded)
    if before in (None, now):
        return None
    return (
        f"{saved.checkpoint} was computed by {before}, and goes on by {now}: the same run to the "
        "rounding of its arithmetic, not bit for bit"
    )


def doubts_about_the_export(architecture: ModelConfig, corpus: Corpus) -> Iterator[str]:
    """What a user should know of the model that the run will leave, in sentences."""
    for prefix in sorted({file.prefix for file in corpus.files if file.metadata is None}):
        yield (
            f"{prefix}.json is missing, as beside any token file that was made elsewhere: its ids "
            "are held against the vocabulary, but nothing says which tokenizer they are of"
        )
    if corpus.tokenizer is None:
        yield "data.tokenizer is not set: the export comes without a tokenizer"
        ends = architecture.eos_token_id
        known = ends if isinstance(ends, tuple) else (ends,)
        if corpus.eos_id is not None and corpus.eos_id not in known:
            yield (
                f"the model file says eos_token_id {ends}, but the documents of the data end with "
                f"{corpus.eos_id}: generation with the exported model will not end; set "
                f"eos_token_id to {corpus.eos_id}, or name data.tokenizer"
            )
        return
    if (obstacle := export_obstacle(corpus.tokenizer)) is not None:
        yield obstacle
    exported = with_ids_of(corpus.tokenizer, architecture)
    for kind in ("bos", "eos", "pad"):
        key = f"{kind}_token_id"
        ours, theirs = getattr(exported, key), getattr(architecture, key)
        if ours != theirs and kind != "pad":
            yield (
                f"the model file says {key} {theirs}, but {corpus.tokenizer} says {ours}: the "
                "export says what the tokenizer does"
            )
