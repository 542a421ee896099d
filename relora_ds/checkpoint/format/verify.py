"""Proof that a directory holds one whole checkpoint, before anything in it is believed.

Three sets of files must be the same: those that the manifest lists, those that are there, and
those that a run of the checkpoint's own description writes. A file beyond them would be obeyed by
a reader that looks for it, and one that is missing from the list would be read unproven.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.manifest import Listed, check_file, read_manifest
from relora_ds.checkpoint.format.record import RunRecord, read_record
from relora_ds.checkpoint.format.stamp import check_stamp
from relora_ds.checkpoint.format.upgrade import STAMPED
from relora_ds.engine.deepspeed.files import shard_files
from relora_ds.errors import CheckpointError
from relora_ds.methods.registry import plan_phases
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.tensor import TensorParallel

_SUFFIXES = (".pt", ".safetensors", ".json", ".yaml", ".model")
"""Of names that a reader may look for. A file of any other name means nothing and is left alone."""


def verify_checkpoint(checkpoint: Path) -> RunRecord:
    """Check everything; by one process.

    Returns:
        What the checkpoint says of itself.

    Raises:
        CheckpointError: it is not one whole checkpoint as it was written; names the file.
    """
    record, listed = verify_description(checkpoint)
    verify_files(checkpoint, record, listed)
    return record


def verify_description(checkpoint: Path) -> tuple[RunRecord, dict[str, Listed]]:
    """Check which files there are, and what the checkpoint says of itself.

    Returns:
        Its description, and the files that it consists of.

    Raises:
        CheckpointError: a file is missing or too many, or the description is not of this place.
    """
    listed = read_manifest(checkpoint)
    for name in (layout.TRAINER, layout.RUN, layout.MODEL):
        if name not in listed:
            raise _unlisted(checkpoint / name, "missing from")
        check_file(checkpoint / name, listed[name])
    record = read_record(checkpoint)
    _check_place(checkpoint, record)
    if layout.state(0) not in listed:
        _check_shards(checkpoint, record)
    required, allowed = _implied(checkpoint, record, listed)
    for name in sorted(required - listed.keys()):
        raise _unlisted(checkpoint / name, "missing from")
    for name in sorted(listed.keys() - required - allowed):
        raise CheckpointError(
            f"{checkpoint / name}: a run with the settings in {layout.RUN} and {layout.TRAINER} "
            "writes no such file: files of several checkpoints were mixed; use another checkpoint"
        )
    for name in sorted(_present(checkpoint) - listed.keys() - {layout.MANIFEST}):
        raise _unlisted(checkpoint / name, "not in")
    return record, listed


def verify_files(
    checkpoint: Path, record: RunRecord, listed: Mapping[str, Listed], names: Iterable[str] = ()
) -> None:
    """Check the contents of files.

    Args:
        record: the checkpoint's description.
        listed: the files that it consists of.
        names: those to check; all of them by default.

    Raises:
        CheckpointError: one is not what was written, or is of another checkpoint.
    """
    for name in names or listed:
        check_file(checkpoint / name, listed[name])
        if record.format >= STAMPED and Path(name).suffix in (".pt", ".safetensors"):
            check_stamp(checkpoint / name, record.origin)


def shares(listed: Mapping[str, Listed], count: int) -> list[list[str]]:
    """Names in `count` parts of about as many bytes each; a part may be empty."""
    parts: list[list[str]] = [[] for _ in range(count)]
    held = [0] * count
    for name in sorted(listed, key=lambda name: (-listed[name].bytes, name)):
        least = held.index(min(held))
        parts[least].append(name)
        held[least] += listed[name].bytes
    return parts


def _check_place(checkpoint: Path, record: RunRecord) -> None:
    """Make sure that a description is one of this directory, and agrees with itself."""
    state, train = record.trainer, record.config.train
    path = checkpoint / layout.TRAINER
    named = layout.step_of(checkpoint.name)
    if named is not None and named != state.step:
        raise CheckpointError(
            f"{path}: step is {state.step}, but the directory is {checkpoint.name}: files of "
            "several checkpoints were mixed; use another checkpoint"
        )
    if state.tokens != state.step * train.global_batch_size * train.seq_length:
        raise CheckpointError(
            f"{path}: tokens is {state.tokens}, which {state.step} updates of the run in "
            f"{layout.RUN} do not read: the file is damaged; use another checkpoint"
        )
    if state.imported_from is not None:
        if state.step:
            raise CheckpointError(
                f"{path}: step is {state.step}, but weights from {state.imported_from} have no "
                "steps behind them: the file is damaged; import the model again"
            )
        return
    phase = {phase.name: phase for phase in plan_phases(record.config)}.get(state.phase)
    if phase is not None and not phase.first_step < state.step <= phase.last_step:
        raise CheckpointError(
            f"{path}: step is {state.step} in the phase {state.phase}, which goes from step "
            f"{phase.first_step + 1} to {phase.last_step}: the file is damaged; use another "
            "checkpoint"
        )


def _check_shards(checkpoint: Path, record: RunRecord) -> None:
    """Make sure that the processes which wrote a description are those of its run."""
    state, path = record.trainer, checkpoint / layout.TRAINER
    if state.tp_size != record.config.parallel.tensor:
        raise CheckpointError(
            f"{path}: tp_size is {state.tp_size}, but the run in {layout.RUN} has parallel.tensor "
            f"{record.config.parallel.tensor}: the files are of different runs; use another "
            "checkpoint"
        )


def _implied(
    checkpoint: Path, record: RunRecord, listed: Mapping[str, Listed]
) -> tuple[set[str], set[str]]:
    """Files that a run of this description writes, and those that it may write.

    Raises:
        CheckpointError: it describes more processes than there are files.
    """
    state = record.trainer
    written = layout.state(0) in listed
    size = 1 if written else state.tp_size
    processes = size * (state.dp_size if state.zero_stage and not written else 1)
    if processes > len(listed):  # each of them writes a file; far more could not be counted out
        raise CheckpointError(
            f"{checkpoint / layout.TRAINER}: {state.dp_size} x {size} processes do not write "
            f"{len(listed)} files: the file is damaged; use another checkpoint"
        )
    suffixes = [TensorParallel(rank, size).suffix for rank in range(size)]
    required = {layout.TRAINER, layout.RUN, layout.MODEL, *map(layout.side, suffixes)}
    allowed = {*layout.TOKENIZER, *map(layout.method, suffixes)}
    if state.method_shards:  # the method has tensors
        required |= set(map(layout.method, suffixes))
    if written:
        count = sum(layout.is_state(name) for name in listed)
        required |= {layout.state(number) for number in range(count)}
    else:
        dtype = DTYPES[record.config.train.precision]
        required |= set(shard_files(state.zero_stage, state.dp_size, size, dtype))
        ranks = min(state.dp_size * size, len(listed))  # at stage 0 dp_size counts no files
        allowed |= {layout.side_of_rank(rank) for rank in range(ranks)}
        rounds = _of_rounds(checkpoint, record, listed)
        required |= rounds[0]
        allowed |= rounds[1]
    return required, allowed


def _of_rounds(
    checkpoint: Path, record: RunRecord, listed: Mapping[str, Listed]
) -> tuple[set[str], set[str]]:
    """Files that islands write which train apart, and those that they write within a round.

    Raises:
        CheckpointError: it describes more of them than there are files.
    """
    state, config = record.trainer, record.config
    count, place = config.parallel.islands, state.dp_size * state.tp_size
    if count == 1 or config.islands.share_gradients:
        return set(), set()
    writers = place if state.zero_stage else state.tp_size
    if (count - 1) * writers > len(listed):
        raise CheckpointError(
            f"{checkpoint / layout.TRAINER}: {count} islands of {place} processes do not write "
            f"{len(listed)} files: the file is damaged; use another checkpoint"
        )
    transport = config.islands.transport
    residual = transport.bits < 32 and transport.error_feedback
    # the moments of the first island are in DeepSpeed's files
    first = 0 if config.islands.outer.momentum or residual else 1
    files = [
        {layout.round_of_rank(number * place + rank) for rank in range(writers)}
        for number in range(count)
    ]
    return set().union(*files[first:]), files[0] if config.islands.in_turn else set()


def _present(checkpoint: Path) -> set[str]:
    """Names in the directory that a reader may look for."""
    try:
        names = os.listdir(checkpoint)
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be read ({error.strerror}); use another checkpoint"
        ) from error
    return {name for name in names if Path(name).suffix in _SUFFIXES}


def _unlisted(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {how} {layout.MANIFEST}, so that it is not proven to be what was written; copy "
        "the checkpoint as it was, or use another one"
    )
