"""Rewriting a checkpoint so that any number of processes and any ZeRO stage can continue it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import RunRecord, ShardedLike, write_record
from relora_ds.checkpoint.format.tensors import split_tensors, write_tensors
from relora_ds.checkpoint.rewriting.place import new_checkpoint, taken
from relora_ds.checkpoint.saved_run import SavedRun, open_saved_run
from relora_ds.checkpoint.saved_state import write_state
from relora_ds.config.rules.tensors import heads_divide_over_tensor
from relora_ds.config.sections import ParallelConfig
from relora_ds.errors import ConfigError


def reshape_checkpoint(
    checkpoint: Path,
    output: Path,
    dp_size: int | None = None,
    stage: int | None = None,
    tp_size: int | None = None,
) -> None:
    """Write the state of a checkpoint by parameter name: exact, of no topology, in today's format.

    Args:
        checkpoint: `step_N`, a directory of checkpoints (the latest), or a run directory.
        output: the new checkpoint; it appears complete or not at all.
        dp_size: data-parallel processes that are going to continue it; default: as before.
        stage: their ZeRO stage; default: as before.
        tp_size: tensor-parallel processes; default: as before.

    Raises:
        ConfigError: the output exists, the batch or the heads do not divide over the processes, or
            there is no such stage.
        CheckpointError: the checkpoint is incomplete, altered, or of an optimizer whose moments are
            not kept by element; or the new one cannot be written.
    """
    run = open_saved_run(checkpoint)
    wanted = {"dp_size": dp_size, "zero_stage": stage, "tp_size": tp_size}
    changes = {key: value for key, value in wanted.items() if value is not None}
    record = replace(run.record, trainer=run.record.trainer.model_copy(update=changes), run="")
    problems = list(_problems(record))
    if (problem := taken(output)) is not None:
        problems.append(problem)
    if problems:
        raise ConfigError(problems)
    with new_checkpoint(output) as directory:
        _write(run, record, directory)


def _write(run: SavedRun, record: RunRecord, directory: Path) -> None:
    saved = run.state()
    write_state(saved, directory, record.origin)
    write_tensors(saved.clocks, directory / layout.side(""), record.origin)
    method = run.method_state()
    _, tensors = split_tensors(method)
    if tensors:
        write_tensors(tensors, directory / layout.method(""), record.origin)
    shards = {
        key: ShardedLike(parameter=name, dim=dim)
        for key, (name, dim) in run.likeness(method).items()
    }
    trainer = record.trainer.model_copy(update={"method_shards": shards})
    write_record(replace(record, trainer=trainer), directory)
    for name in sorted(layout.TOKENIZER):
        if (run.checkpoint / name).is_file():
            shutil.copyfile(run.checkpoint / name, directory / name)


def _problems(record: RunRecord) -> Iterator[str]:
    """What speaks against continuing a run with the processes and the stage of its record."""
    state = record.trainer
    if state.imported_from is not None:
        yield (
            "--checkpoint is an import, which runs of any number of processes and any ZeRO stage "
            "begin with as it is: name it in their checkpoint.resume"
        )
        return
    total = record.config.train.global_batch_size
    if state.dp_size > 0 and total % state.dp_size:  # a smaller micro-batch may be set at resume
        fitting = [size for size in range(1, state.dp_size) if total % size == 0]
        yield (
            f"--data-parallel is {state.dp_size}, but must divide the run's "
            f"train.global_batch_size ({total}), which a resume keeps: take {fitting[-1]}"
        )
    parallel = ParallelConfig(tensor=max(1, state.tp_size))
    for _, message in heads_divide_over_tensor(parallel, record.architecture):
        yield f"--tensor {message}"
    if state.dp_size < 1 or state.tp_size < 1 or state.zero_stage not in range(4):
        yield (
            f"{state.dp_size} x {state.tp_size} processes at ZeRO stage {state.zero_stage}: take "
            "1 or more, and 0 to 3"
        )
