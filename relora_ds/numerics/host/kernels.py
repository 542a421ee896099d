"""Kernels in C for tensors on the host: compiled when first used, run on torch's threads.

They are built for this very processor in less than a second and not kept: nodes that share a
directory may differ.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

_logger = logging.getLogger(__name__)
_SHARED_FROM = 1 << 18
"""Elements from which several threads are worth waking."""
# contraction would round an element by where its slice ends; errno keeps roots from vectorising
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


@functools.cache
def load_kernels(source: Path) -> ctypes.CDLL | None:
    """The functions of a C file; None, with a warning, where there is no compiler."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / f"{source.stem}.so"
        command = [*host_compiler(), *_FLAGS, "-shared", "-fPIC", str(source)]
        try:
            subprocess.run(
                [*command, "-o", str(target), "-lm"],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
            )
            return ctypes.CDLL(str(target))  # stays mapped without its file
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            _logger.warning(
                "the kernel %s cannot be compiled, what it computes takes several times as long: "
                "install a C compiler or set CC (%s)",
                source.stem,
                reason.strip().partition("\n")[0],
            )
            return None


def host_compiler() -> list[str]:
    """The words of the command that compiles C: CC may hold options, or a cache before it."""
    try:
        return shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError:  # a quotation mark that is never closed
        return [os.environ["CC"]]


def in_parts(kernel: Callable[[int, int], object], units: int, elements: int) -> None:
    """Run kernel(first, stop) over range(units), on several threads if there is enough to do.

    Args:
        units: what a thread takes whole, such as rows.
        elements: of all units together.
    """
    threads = min(torch.get_num_threads(), units) if elements >= _SHARED_FROM else 1
    if threads == 1:
        kernel(0, units)
        return
    cuts = [units * number // threads for number in range(threads + 1)]
    list(_pool(threads).map(kernel, cuts[:-1], cuts[1:]))


def ieee_roots(values: torch.Tensor) -> torch.Tensor:
    """Roots of fp32 values on the host, in place and rounded once, where there are no kernels.

    They are those of C and of GPUs. torch's own on CPUs come from a library of vector functions and
    may miss by a unit in the last place.
    """
    array = values.numpy()
    np.sqrt(array, out=array)
    return values


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "host_kernels")  # ctypes lets go of the interpreter
