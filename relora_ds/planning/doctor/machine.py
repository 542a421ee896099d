"""Checks of this machine: GPUs, compiler, launcher, memory, disk, ports, variables."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from relora_ds.engine.accelerator import check_accelerator, describe_machine
from relora_ds.errors import ConfigError
from relora_ds.numerics.host.kernels import host_compiler
from relora_ds.planning.doctor.finding import Finding
from relora_ds.redaction import is_secret

PORT = 29500
"""Where processes meet unless MASTER_PORT says otherwise."""
_GIB = 1 << 30
_LEAST_FREE = 10 * _GIB
_LEAST_SHARED = 1 * _GIB  # NCCL's and the data loader's segments
_LEAST_FILES = 1024
_CLOCK_SECONDS = 5.0


def accelerator() -> Iterator[Finding]:
    """Whether torch can use the GPUs that are there, and flash-attn with them."""
    try:
        check_accelerator()
    except ConfigError as error:
        yield Finding("gpu", "problem", str(error), "update the driver, or take another torch")
        return
    on_cuda = torch.cuda.is_available()
    yield Finding("gpu", "ok", describe_machine(torch.device("cuda" if on_cuda else "cpu")))
    if on_cuda and os.environ.get("DS_ACCELERATOR") == "cpu":
        said = "DS_ACCELERATOR=cpu, so that runs leave the GPUs alone"
        yield Finding("gpu", "warning", said, "unset DS_ACCELERATOR to train on the GPUs")
    if not on_cuda:
        yield Finding("flash-attn", "note", "is for GPUs; attention runs in torch's kernels here")
        return
    try:
        yield Finding("flash-attn", "ok", importlib.metadata.version("flash-attn"))
    except importlib.metadata.PackageNotFoundError:
        said = "is not installed: attention runs in torch's kernels, faster from Hopper on"
        yield Finding("flash-attn", "note", said)


def compiler() -> Iterator[Finding]:
    """Whether kernels for the host can be compiled."""
    name = host_compiler()[0]
    found = shutil.which(name)
    if found is not None:
        yield Finding("compiler", "ok", found)
    else:
        said = f"{name} is not there: host kernels run as tensor operations, several times slower"
        yield Finding("compiler", "warning", said, "apt-get install gcc, or set CC")


def launcher() -> Iterator[Finding]:
    """Whether the deepspeed launcher is that of this environment."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = shutil.which("deepspeed")
    if not beside.is_file():
        said = f"there is no deepspeed beside {sys.executable}"
        remedy = "pip install deepspeed, or activate the environment: . .venv/bin/activate"
        yield Finding("launcher", "problem", said, remedy)
    elif found is None or not os.path.samefile(found, beside):
        said = f"`deepspeed` is {found or 'not on the PATH'}, this environment's is {beside}"
        yield Finding("launcher", "warning", said, "activate the environment: . .venv/bin/activate")
    else:
        yield Finding("launcher", "ok", found)


def memory() -> Iterator[Finding]:
    """Shared memory, open files and memory that may be pinned."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        said = f"{free / _GIB:.1f} GiB free in {shared}"
        if free < _LEAST_SHARED:
            remedy = "start the container with --ipc=host or --shm-size=8g"
            yield Finding("shared memory", "warning", said, remedy)
        else:
            yield Finding("shared memory", "ok", said)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _LEAST_FILES:
        yield Finding("open files", "warning", f"{files} at most", "ulimit -n 65536")
    else:
        most = "as many as wanted" if files == resource.RLIM_INFINITY else f"{files} at most"
        yield Finding("open files", "ok", most)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if torch.cuda.is_available() and locked != resource.RLIM_INFINITY:
        said = f"{locked:,} bytes may be locked: InfiniBand registers its buffers"
        yield Finding("locked memory", "warning", said, "ulimit -l unlimited")


def disk(directory: Path) -> Iterator[Finding]:
    """Whether results can be written to a directory, have room, and get times of this clock."""
    place = next(each for each in (directory, *directory.resolve().parents) if each.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        remedy = "choose an output_dir that can be written, or free its space"
        yield Finding("disk", "problem", f"{place}: {error.strerror}", remedy)
        return
    free = shutil.disk_usage(place).free
    said = f"{free / _GIB:.1f} GiB free in {place}"
    if free < _LEAST_FREE:
        remedy = "free some space: checkpoint.keep checkpoints and one more lie there at a time"
        yield Finding("disk", "warning", said, remedy)
    else:
        yield Finding("disk", "ok", said)
    if skew > _CLOCK_SECONDS:
        said = f"files in {place} get times that are {skew:.0f} s off this machine's clock"
        yield Finding("clock", "warning", said, "synchronise the clocks: chronyc makestep")


def port() -> Iterator[Finding]:
    """Whether the port where processes meet is free."""
    text = os.environ.get("MASTER_PORT", str(PORT))
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 1 << 16:
        yield Finding("port", "problem", f"MASTER_PORT is {text!r}", f"export MASTER_PORT={PORT}")
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            remedy = f"end the job that holds it, or export MASTER_PORT={int(text) % 60000 + 1}"
            said = f"port {text} cannot be listened on ({error.strerror})"
            yield Finding("port", "problem", said, remedy)
            return
    yield Finding("port", "ok", f"port {text} is free")


def variables(
    environ: Mapping[str, str], interfaces: Mapping[int, str] | None = None
) -> Iterator[Finding]:
    """Variables of the environment that change runs, and credentials that would travel.

    Args:
        environ: of the process.
        interfaces: names of the network's by number; default: this machine's.
    """
    known = set((interfaces or dict(socket.if_nameindex())).values())
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = [each.lstrip("=") for each in environ.get(name, "").split(",") if each]
        missing = [each for each in wanted if not any(have.startswith(each) for have in known)]
        if missing and not environ[name].startswith("^"):
            said = f"{name}={environ[name]} names no interface of this machine"
            yield Finding("variables", "problem", said, f"name one of {', '.join(sorted(known))}")
    # what has no home directory, as under a number without a name, has no such file there
    for place in (Path(os.path.expanduser("~/.deepspeed_env")), Path(".deepspeed_env")):
        lines = place.read_text(errors="replace").splitlines() if place.is_file() else []
        secrets = [line.partition("=")[0] for line in lines if is_secret(line.partition("=")[0])]
        if secrets:
            said = f"{place} holds {', '.join(secrets)}, which reach every node on a command line"
            remedy = "put credentials where their libraries look: ~/.netrc, `hf auth login`"
            yield Finding("variables", "warning", said, remedy)
