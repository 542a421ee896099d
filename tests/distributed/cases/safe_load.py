"""Restoring DeepSpeed's own files, watched: what is unpickled, and what is taken from them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from relora_ds.engine import distributed
from relora_ds.engine.deepspeed.checkpoint_engine import TensorFiles
from relora_ds.engine.deepspeed.files import read_shard
from relora_ds.engine.distributed import _host_group
from relora_ds.errors import CheckpointError
from relora_ds.parallel.topology import Topology
from tests.harness.build import Training, batches, changed
from tests.harness.nccl_rules import NcclRules
from tests.harness.resume import load, save
from tests.harness.runs import EVENTFUL, RATES, SMALL_BUCKETS, clipped


class Runs:
    """Makes a file by a shell command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._witness}",)


def restored(
    topology: Topology, stage: int, precision: str, per_layer: bool, directory: Path
) -> dict[str, Any]:
    """A run that is saved after two updates, and restored from its files and from altered ones.

    Returns:
        `unsafe`, how often `torch.load` was called in a way that runs code; `loads`, how often at
        all; `same`, whether weights came back; `refused`, for each file with code in it what was
        said; `ran`, whether any of it ran; `settings`, the optimizer's weight decays after files
        that name others were restored; `own`, those of the run.
    """
    config = clipped(EVENTFUL["relora"], precision)
    if per_layer:
        config = changed(config, "train", per_layer_update=True)
    zero = {"stage": stage, **SMALL_BUCKETS}
    run = Training(config, topology, zero)
    for step, tokens in enumerate(batches(2)):
        run.update(step, tokens, RATES)
    saved, weights = save(run, directory), run.gather(list(run.named.values()))
    weights = [weight.clone() for weight in weights]
    run.destroy()
    found: dict[str, Any] = {"loads": 0, "unsafe": 0, "refused": []}
    original = torch.load

    def watched(*arguments: Any, **options: Any) -> Any:
        found["loads"] += 1
        found["unsafe"] += options.get("weights_only") is not True
        return original(*arguments, **options)

    with mock.patch.object(torch, "load", watched):
        run = Training(config, topology, zero)
        load(run, saved)
        again = run.gather(list(run.named.values()))
        found["same"] = all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        found["own"] = _decays(run)
        for path in sorted(saved.files.iterdir()):
            content = read_shard(path)
            _set_decays(content)
            torch.save(content, path)
        load(run, saved)
        found["settings"] = _decays(run)
        for path in sorted(saved.files.iterdir()):
            content = path.read_bytes()
            torch.save({**read_shard(path), "more": Runs(directory / "ran")}, path)
            found["refused"].append(_refusal(run, saved.directory))
            path.write_bytes(content)
    run.destroy()
    found["ran"] = (directory / "ran").exists()
    return found


def _refusal(run: Training, directory: Path) -> str:
    try:
        run.engine.load(str(directory), "tag")
    except CheckpointError as error:
        return str(error)
    return ""


def _decays(run: Training) -> list[float]:
    return [group["weight_decay"] for group in run.engine.optimizer.param_groups]


def _set_decays(content: Any) -> None:
    """Other weight decays wherever a file keeps an optimizer's groups."""
    if isinstance(content, dict):
        if "weight_decay" in content:
            content["weight_decay"] = 0.77
        for value in content.values():
            _set_decays(value)
    elif isinstance(content, list):
        for value in content:
            _set_decays(value)


def late_reader(topology: Topology, directory: Path) -> list[tuple[float, float | None]]:
    """The last rank of a run at stage 3 is slow to read its files.

    Returns:
        For every rank when it had read, and when it entered a collective of the device.
    """
    config, zero = clipped(EVENTFUL["relora"], "bf16"), {"stage": 3, **SMALL_BUCKETS}
    run = Training(config, topology, zero)
    saved = save(run, directory)
    read, read_at = TensorFiles.load, 0.0

    def slow(files: TensorFiles, path: str, map_location: Any = None) -> dict[str, Any]:
        nonlocal read_at
        time.sleep(0.2 * topology.rank)
        content = read(files, path, map_location)
        read_at = time.monotonic()
        return content

    device = NcclRules([_host_group()])
    with mock.patch.object(TensorFiles, "load", slow), device:
        run.engine.load(str(saved.directory), "tag")
    run.destroy()
    return distributed.gather_objects((read_at, device.began_at))
