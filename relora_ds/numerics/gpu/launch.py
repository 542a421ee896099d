"""When kernels in Triton compute, and how they are started.

Modules with kernels import Triton, which CPU builds of torch do not bring along: callers ask
`usable` first and import them then. Kernels work through tables of addresses, so that one launch
serves all projections of a model.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from relora_ds.numerics.transfers import upload

_logger = logging.getLogger(__name__)


def usable(device: torch.device) -> bool:
    """Whether kernels in Triton compute on a device.

    They do on GPUs where Triton works; with `RELORA_DS_TRITON=0` torch's operations compute
    instead. With `RELORA_DS_TRITON=cpu` they run on CPUs too, very slowly, under the interpreter
    that Triton's own `TRITON_INTERPRET=1` asks for. What torch's compiler traces is left to it.
    """
    if torch.compiler.is_compiling():
        return False
    asked = os.environ.get("RELORA_DS_TRITON")
    if device.type == "cpu":
        return asked == "cpu"
    return device.type == "cuda" and asked != "0" and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a kernel compiles and runs there; a warning says why not."""
    try:
        if find_spec("triton") is None:
            raise ImportError("triton is not installed")
        # this is what imports Triton
        from relora_ds.numerics.gpu.rows import clear_rows

        written = torch.ones(1, 3, device=device)
        clear_rows([(written, torch.zeros(1, dtype=torch.int64))])
        if bool(written.any()):
            raise RuntimeError("a kernel did not write what it should")
    # whatever Triton, its compiler or the driver raise
    except Exception as error:
        _logger.warning(
            "kernels in Triton cannot be used on %s, switches and 8-bit moments take several times "
            "as long: install the triton that belongs to torch %s and a C compiler, or set "
            "RELORA_DS_TRITON=0 (%s: %s)",
            device,
            torch.__version__,
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return False
    return True


def start(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Start a kernel; the host does not wait.

    No product and sum are fused into one rounding unless `options` say so: results are then those
    of a CPU bit for bit.

    Args:
        kernel: a function of `triton.jit`.
        grid: programs along up to three axes; nothing is started if one of them is 0.
        arguments: of the kernel, in order.
        options: further arguments by name, and those of Triton's compiler.
    """
    if all(grid):
        kernel[tuple(grid)](*arguments, **({"enable_fp_fusion": False} | options))


def send_tables(tables: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tables of int64 on a device, in one copy, for which the host does not wait.

    Args:
        tables: (jobs, columns) each.
        device: where the kernels run.
    """
    flat = np.concatenate([table.reshape(-1) for table in tables])
    parts = upload(torch.from_numpy(flat), device).split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
