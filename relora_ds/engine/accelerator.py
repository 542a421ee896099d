"""The GPUs of this machine, their driver, and whether this build of torch can use them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from relora_ds.errors import ConfigError
from relora_ds.numerics.gpu import launch

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_PATIENCE_S = 20  # nvidia-smi takes seconds where the driver must be loaded first
_OLDER_BUILD = "https://download.pytorch.org/whl/cu126"


def check_accelerator() -> None:
    """Refuse a machine whose GPUs torch cannot use: a run on its CPU is not what was meant.

    ``DS_ACCELERATOR=cpu`` says that it is meant.

    Raises:
        ConfigError: ``nvidia-smi -L`` lists GPUs and torch sees none.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or torch.cuda.is_available():
        return
    listed = sum(line.startswith("GPU ") for line in _nvidia_smi("-L").splitlines())
    if listed:
        raise ConfigError(
            f"nvidia-smi lists {listed} GPUs (driver {driver_version() or 'unknown'}), but "
            f"{_why_none()}. DS_ACCELERATOR=cpu trains on the CPU"
        )


@cache
def driver_version() -> str | None:
    """Version of NVIDIA's driver, such as ``580.95.05``, or None where there is none."""
    try:
        found = re.search(r"\b\d{3}\.[\d.]+\b", _KERNEL_MODULE.read_text())
    except OSError:
        found = None
    if found:
        return found.group()
    # a sandbox may have the device without the kernel's files
    answer = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()
    return answer[0] if answer else None


def describe_machine(device: torch.device) -> str:
    """One line: the device that this process computes on, torch with what it was built for, and the
    driver."""
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else f"CPU ({platform.machine()})"
    line = f"{name}, torch {torch.__version__}"
    if torch.version.cuda:
        line += f", CUDA {torch.version.cuda}, driver {driver_version() or 'none'}"
    return line


def describe_arithmetic(device: torch.device, compiled: bool = False, padded: bool = False) -> str:
    """What the last bits of a result depend on: torch, the processor, and whose kernels compute.

    Kernels in C and what stands in for them on a host have the same bits, and are not named.

    Args:
        device: that computes.
        compiled: whether torch's compiler makes the kernels of layers.
        padded: whether MLPs are computed at padded widths.
    """
    layers = " and compiled layers" if compiled else ""
    layers += " and padded MLPs" if padded else ""
    if device.type != "cuda":
        processor = torch.backends.cpu.get_cpu_capability()
        return f"torch {torch.__version__} on a CPU with {processor}{layers}"
    kernels = "kernels in Triton" if launch.usable(device) else "torch's operations"
    name = torch.cuda.get_device_name(device)
    return f"torch {torch.__version__} on {name} with {kernels}{layers}"


def _why_none() -> str:
    """Why torch sees no GPU, and the remedy."""
    built = f"torch {torch.__version__}"
    remedy = f"a build that this driver can run (TORCH_INDEX_URL={_OLDER_BUILD} for launch scripts)"
    if torch.version.cuda is None:
        return f"{built} is a build for CPUs: install {remedy}"
    built += f" for CUDA {torch.version.cuda}"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"{built} sees none with CUDA_VISIBLE_DEVICES={hidden!r}: unset it, or take {remedy}"
    return f"{built} sees none: that driver is too old for it. Update it, or install {remedy}"


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; empty where it is missing, fails or hangs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
