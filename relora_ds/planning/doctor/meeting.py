"""Processes that meet: what every rank of the check does, and the check that starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from relora_ds.planning.doctor.finding import Finding
from relora_ds.planning.doctor.hostfile import Node

_PATIENCE_S = 120.0
_SILENCE = timedelta(seconds=60)
_MET = "ranks met"


def meet(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Whether processes on all devices add up a number together.

    Args:
        nodes: those that train; none for this machine alone.
    """
    with tempfile.NamedTemporaryFile("w", prefix="hostfile-") as hostfile:
        hostfile.writelines(f"{node}\n" for node in nodes)
        hostfile.flush()
        yield from _meet(hostfile.name if nodes else None)


def _meet(hostfile: str | None) -> Iterator[Finding]:
    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    backend = "nccl" if on_cuda else "gloo"
    if hostfile is None:
        size = max(torch.cuda.device_count(), 1) if on_cuda else 2
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(size), "-m", __spec__.name]
    else:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        command = [launcher, "--hostfile", hostfile, "--module", __spec__.name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S
        )
        said, failed = done.stdout + done.stderr, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        said, failed = f"not done within {error.timeout:.0f} s", True
    except OSError as error:
        said, failed = f"{command[0]}: {error.strerror}", True
    met = next((line for line in said.splitlines() if _MET in line), None)
    if met is not None and not failed:
        yield Finding(backend, "ok", met.strip())
        return
    lines = [line.strip() for line in said.splitlines() if "Error" in line] or said.splitlines()
    remedy = "name the interface that the nodes share: export "
    remedy += (
        "NCCL_SOCKET_IFNAME=eth0 (NCCL_DEBUG=INFO tells more)"
        if on_cuda
        else ("GLOO_SOCKET_IFNAME=eth0")
    )
    yield Finding(backend, "problem", lines[-1] if lines else "no rank said anything", remedy)


def main() -> None:
    """One rank: joins the others and adds up ones."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=_SILENCE)
    total = torch.ones(1, device=device)
    distributed.all_reduce(total)
    if rank == 0:
        sys.stdout.write(f"{int(total.item())} of {world} {_MET} over {backend}\n")
    distributed.destroy_process_group()
    if int(total.item()) != world:
        sys.exit(1)


if __name__ == "__main__":
    main()
