"""What stands beside every figure: device, clocks, versions, date."""

from __future__ import annotations

import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from relora_ds.engine.accelerator import driver_version

_QUERY = "name,clocks.sm,clocks.mem,temperature.gpu,power.draw"


def describe(device: str) -> dict[str, str | None]:
    """Device and versions. Asks nvidia-smi: CUDA is not touched in this process."""
    name, clocks = _gpu() if device == "cuda" else (f"CPU ({platform.machine()})", None)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "clocks": clocks,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "python": platform.python_version(),
        "deepspeed": _version("deepspeed"),
        "triton": _version("triton"),
    }


def _gpu() -> tuple[str, str | None]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "GPU (no nvidia-smi)", None
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "GPU (nvidia-smi does not answer)", None
    name, *rest = (part.strip() for part in (done.stdout.splitlines() or [""])[0].split(","))
    return name or "GPU", ", ".join(rest) or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
