"""Rewriting a checkpoint so that any number of processes and any ZeRO stage can continue it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save_file

from relora_ds.config.checks import batch_divides_over_processes
from relora_ds.engine.saved_state import write_state
from relora_ds.errors import ConfigError
from relora_ds.train.checkpoint import (
    COPIED,
    find_checkpoint,
    open_saved_state,
    read_run,
    read_trainer_state,
)
from relora_ds.train.manifest import verify_manifest, write_manifest


def reshape_checkpoint(
    checkpoint: Path, output: Path, dp_size: int | None = None, stage: int | None = None
) -> None:
    """Write the state of a checkpoint by parameter name: exact, and of no topology.

    Args:
        checkpoint: `step_N`, a directory of checkpoints (the latest), or a run directory.
        output: the new checkpoint; it appears complete or not at all.
        dp_size: data-parallel processes that are going to continue it; default: as before.
        stage: their ZeRO stage; default: as before.

    Raises:
        ConfigError: the output exists, the batch does not divide over the processes, or there is no
            such stage.
        CheckpointError: the checkpoint is incomplete, altered, or of an optimizer whose moments are
            not kept by element.
    """
    source = find_checkpoint(checkpoint)
    verify_manifest(source)
    config, architecture = read_run(source)
    state = read_trainer_state(source)
    dp_size = state.dp_size if dp_size is None else dp_size
    stage = state.zero_stage if stage is None else stage
    problems = [message for _, message in batch_divides_over_processes(config.train, dp_size)]
    if dp_size < 1 or stage not in range(4):
        problems.append(f"{dp_size} processes at ZeRO stage {stage}: take 1 or more, and 0 to 3")
    if output.exists():
        problems.append(f"{output} exists: name a new directory")
    if problems:
        raise ConfigError(problems)
    saved = open_saved_state(source, config, architecture)
    staging = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_state(saved, staging)
    save_file(saved.clocks, staging / "side.safetensors")
    text = json.dumps(asdict(replace(state, dp_size=dp_size, zero_stage=stage)), indent=1)
    (staging / "trainer.json").write_text(text + "\n")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    write_manifest(staging)
    staging.rename(output)
