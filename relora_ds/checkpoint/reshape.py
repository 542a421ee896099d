"""Rewriting a checkpoint so that any number of processes and any ZeRO stage can continue it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from relora_ds.checkpoint.manifest import verify_manifest, write_manifest
from relora_ds.checkpoint.saved_run import SavedRun, read_run
from relora_ds.checkpoint.saved_state import write_state
from relora_ds.checkpoint.store import COPIED, METHOD_FILE, find_checkpoint
from relora_ds.config.checks import batch_divides_over_processes, heads_divide_over_tensor
from relora_ds.config.sections import ParallelConfig
from relora_ds.errors import ConfigError


def reshape_checkpoint(
    checkpoint: Path,
    output: Path,
    dp_size: int | None = None,
    stage: int | None = None,
    tensor_size: int | None = None,
) -> None:
    """Write the state of a checkpoint by parameter name: exact, and of no topology.

    Args:
        checkpoint: `step_N`, a directory of checkpoints (the latest), or a run directory.
        output: the new checkpoint; it appears complete or not at all.
        dp_size: data-parallel processes that are going to continue it; default: as before.
        stage: their ZeRO stage; default: as before.
        tensor_size: tensor-parallel processes; default: as before.

    Raises:
        ConfigError: the output exists, the batch or the heads do not divide over the processes, or
            there is no such stage.
        CheckpointError: the checkpoint is incomplete, altered, or of an optimizer whose moments are
            not kept by element.
    """
    source = find_checkpoint(checkpoint)
    verify_manifest(source)
    config, architecture = read_run(source)
    run = SavedRun(source, config, architecture)
    state = run.trainer
    dp_size = state.dp_size if dp_size is None else dp_size
    stage = state.zero_stage if stage is None else stage
    tensor_size = state.tensor_size if tensor_size is None else tensor_size
    parallel = ParallelConfig(tensor=max(1, tensor_size))
    problems = [message for _, message in batch_divides_over_processes(config.train, dp_size)]
    problems += [message for _, message in heads_divide_over_tensor(parallel, architecture)]
    if dp_size < 1 or tensor_size < 1 or stage not in range(4):
        problems.append(
            f"{dp_size} x {tensor_size} processes at ZeRO stage {stage}: take 1 or more, and 0 to 3"
        )
    if output.exists():
        problems.append(f"{output} exists: name a new directory")
    if problems:
        raise ConfigError(problems)
    saved = run.state()
    staging = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_state(saved, staging)
    save_file(saved.clocks, staging / "side.safetensors")
    method = run.method_state()
    tensors = {key: v for key, v in method.items() if isinstance(v, torch.Tensor)}
    if tensors:
        save_file(tensors, staging / METHOD_FILE.format(""))
    later = replace(state, dp_size=dp_size, zero_stage=stage, tensor_size=tensor_size)
    text = json.dumps(asdict(later), indent=1)
    (staging / "trainer.json").write_text(text + "\n")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    write_manifest(staging)
    staging.rename(output)
