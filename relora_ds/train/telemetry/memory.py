"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def max_allocated_bytes(device: torch.device | str | None = None) -> int:
    """Most memory in use so far, in bytes.

    On a CUDA device: what tensors occupied, without the allocator's reserve. On the host: the peak
    resident set of the process, which includes the interpreter and its libraries.

    Args:
        device: default: the current CUDA device if the process uses CUDA, otherwise the host.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def restart_peak(device: torch.device) -> int:
    """Count a CUDA device's peak from here on; the host keeps its own for the whole process.

    Returns:
        The peak so far, in bytes.
    """
    peak = max_allocated_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return peak
