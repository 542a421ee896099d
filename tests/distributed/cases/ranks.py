"""Cases that misbehave, and one that trains."""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

import deepspeed
import torch
from torch import nn

from relora_ds.accounting.recorder import recorder
from relora_ds.engine import distributed
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import CUT, Training, batches, changed
from tests.harness.runs import RATES, relora


def losses(topology: Topology, stage: int, tensor: int) -> list[float]:
    """Of six updates of ReLoRA with a merge."""
    config = changed(relora("zero", "fp32"), "parallel", tensor=tensor)
    run = Training(config, share_models(topology, config), {"stage": stage}, CUT)
    found = [run.update(step, tokens, RATES).loss for step, tokens in enumerate(batches(6))]
    run.destroy()
    return found


def leave_a_mess(topology: Topology) -> None:
    """Change what a later case would notice, and leave collectives unanswered."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    os.environ["MESS"] = "left"
    recorder.start()
    losses(topology, 3, 2)
    if topology.rank == 1:
        raise RuntimeError("rank 1 has had enough")
    distributed.barrier()


def hang(topology: Topology) -> None:
    """Wait for ever."""
    while True:
        time.sleep(1)


def surroundings(topology: Topology) -> tuple[torch.dtype, int, str, bool, int]:
    """What a case finds: default dtype, seed, a variable, the recorder, the number of ranks."""
    counted = bool(recorder.volumes())
    mess = os.environ.get("MESS", "")
    size = torch.distributed.get_world_size()
    return torch.get_default_dtype(), torch.initial_seed(), mess, counted, size


def slow_host_work(topology: Topology, timeout_minutes: float, work_s: float) -> dict[str, object]:
    """Rank 0 works on its host, longer than a collective may take, while the others wait."""
    distributed.stop()
    distributed.start(timeout_minutes)
    if topology.is_main:
        time.sleep(work_s)
    distributed.barrier()
    said = distributed.broadcast_object("done" if topology.is_main else "not asked")
    everywhere = distributed.gather_objects((topology.rank, said))
    asked = [distributed.any_rank(topology.rank == asked) for asked in (0, 1, 2)]
    try:  # the limit is one of collectives all the same
        if topology.is_main:
            time.sleep(work_s)
        else:
            torch.distributed.barrier()
        bounded = False
    except RuntimeError as error:
        bounded = distributed.lost_peers(error)
    return {
        "everywhere": everywhere,
        "asked": asked,
        "bounded": distributed.gather_objects(bounded),
    }


def late_builder(topology: Topology) -> list[tuple[float, float]]:
    """The last rank is slow to fill its model.

    Returns:
        For every rank when its model was filled, and when it met the others in DeepSpeed.
    """
    filled_at, met_at, initialize = 0.0, 0.0, deepspeed.initialize

    def fill(model: nn.Module) -> None:
        nonlocal filled_at
        time.sleep(0.2 * topology.rank)
        filled_at = time.monotonic()

    def meet(*arguments: Any, **named: Any) -> Any:
        nonlocal met_at
        met_at = time.monotonic()
        return initialize(*arguments, **named)

    with mock.patch.object(deepspeed, "initialize", meet):
        run = Training(relora("zero", "fp32"), topology, {"stage": 1}, prepare=fill)
    run.destroy()
    return distributed.gather_objects((filled_at, met_at))
