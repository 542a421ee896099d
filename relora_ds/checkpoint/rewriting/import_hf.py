"""A model directory in Hugging Face's layout, written as a checkpoint of ours.

An import is the beginning of a run: weights by name in the dtype that the directory keeps them in,
no optimizer state, of no topology. It is listed in a manifest and proved like any checkpoint. Its
`run.yaml` describes the least run that could begin with it, full-rank and of one step.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from relora_ds.checkpoint.export.dense import FiniteWeights
from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import RunRecord, TrainerState, write_record
from relora_ds.checkpoint.format.tensors import write_tensors
from relora_ds.checkpoint.rewriting.place import new_checkpoint, taken
from relora_ds.checkpoint.saved_state import write_parts
from relora_ds.config.methods.full import FullConfig
from relora_ds.config.model import ModelConfig
from relora_ds.config.schema import RunConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.data.tokenizer import special_ids, tokenizers_in
from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.model.hf.directory import DTYPES
from relora_ds.model.hf.weights import read_hf

_SEQ_LENGTH = 2048
"""Longest sequence of the run that an import describes."""


def import_hf(source: Path, output: Path, *, with_tokenizer: bool = True) -> None:
    """Write a model of the LLaMA family as a checkpoint that a run can begin with.

    Args:
        source: a directory with `config.json` and weights, safetensors or torch's, whole or shards.
        output: the new checkpoint; it appears complete or not at all.
        with_tokenizer: whether the tokenizer in `source` goes with it.

    Raises:
        ConfigError: the output exists, or `source` describes no model that is known here.
        CheckpointError: its weights are damaged, of another model, not finite, or of a dtype that
            no export has; or the checkpoint cannot be written.
        DataError: its tokenizer cannot be read.
    """
    if (problem := taken(output)) is not None:
        raise ConfigError(problem)
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"{source} holds no config.json: give the directory of a model in Hugging Face's "
            "layout, as transformers' save_pretrained writes it"
        )
    architecture, weights = read_hf(source)
    tokenizers = tokenizers_in(source) if with_tokenizer else []
    for file in tokenizers:
        special_ids(file)
    with new_checkpoint(output) as directory:
        record = _record(source, output, architecture)
        write_parts(_values(weights, source), 0, directory, record.origin)
        write_tensors({}, directory / layout.side(""), record.origin)
        write_record(record, directory)
        for name in sorted(layout.TOKENIZER) if tokenizers else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)


def _record(source: Path, output: Path, architecture: ModelConfig) -> RunRecord:
    length = min(architecture.max_position_embeddings, _SEQ_LENGTH)
    config = RunConfig(
        output_dir=str(output),
        model=str(source),
        deepspeed="none",
        method=FullConfig(name="full"),
        train=TrainConfig(
            steps=1, seq_length=length, micro_batch_size=1, global_batch_size=1, precision="fp32"
        ),
    )
    trainer = TrainerState(
        step=0,
        tokens=0,
        phase=config.method.name,
        dp_size=1,
        tp_size=1,
        zero_stage=0,
        method={},
        telemetry={},
        data_fingerprints=[],
        method_shards={},
        imported_from=str(source.resolve()),
    )
    return RunRecord(trainer, config, architecture)


def _values(
    weights: Mapping[str, torch.Tensor], source: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight as the file of a saved state has it: flat, under the name of its master."""
    for name, weight in FiniteWeights(weights, source).items():
        if weight.dtype not in DTYPES:
            known = ", ".join(DTYPES.values())
            raise CheckpointError(
                f"{source}: {name} is stored as {weight.dtype}, but an import keeps {known}: save "
                "the model in one of them"
            )
        yield f"master.{name}", weight.contiguous().view(-1)
