"""The AdamW update of matrices whose rows or columns have coefficients of their own.

torch's fused kernel has one step count per tensor, and a rank vector is strided if it is a column.
One pass over memory needs a kernel: on a CPU a few lines of C, elsewhere what torch's compiler
makes of the operations.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from relora_ds.numerics.host_kernels import in_parts, load_kernels

_SHAPES = 64
_logger = logging.getLogger(__name__)
_COMPILED_FROM = 1 << 15
"""Elements; by the size alone, so that a resumed run computes with the same kernel."""
_SOURCE = Path(__file__).with_suffix(".c")


class Tensors(NamedTuple):
    """What an update reads and writes: flat, contiguous, of equal length."""

    p: torch.Tensor
    grad: torch.Tensor
    """Kept."""
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class Rectangle(NamedTuple):
    """A matrix in a flat tensor, and its vectors. The C kernel reads these as they are."""

    at: int
    """Offset of its first element."""
    rows: int
    cols: int
    axis: int
    """0 if the rows are the vectors, 1 if the columns are."""
    first: int
    """Column of the factors that belongs to its first vector."""


def update_blocks(
    tensors: Tensors,
    blocks: Sequence[Rectangle],
    factors: torch.Tensor,
    betas: tuple[float, float],
) -> None:
    """p = decay * p - m / (sqrt(v) * slope + shift), after m and v took up live * grad. In place.

    Args:
        blocks: the elements to update, none of them twice.
        factors: (4, vectors), four numbers for each of them. live: 1, or 0 to ignore the gradient;
            decay: factor of the weights; slope: bias correction of the root of v, divided by the
            learning rate; shift: bias-corrected epsilon, divided by it, infinite for no update.
        betas: decay rates of m and v.
    """
    p = tensors.p
    if p.device.type == "cpu" and p.dtype == tensors.grad.dtype == torch.float32:
        library = load_kernels(_SOURCE)
        if library is not None:
            return _run(library, tensors, blocks, factors, betas)
    for at, rows, cols, axis, first in blocks:
        matrices = [t[at : at + rows * cols].view(rows, cols) for t in tensors]
        along = factors[:, first : first + (rows, cols)[axis]].unsqueeze(2 - axis).unbind()
        # a vector that is one element high has another kernel: not worth it either
        large = p.device.type != "cpu" and rows * cols >= _COMPILED_FROM and min(rows, cols) > 1
        step: Callable[..., None] = _compiled() if large else _step
        step(*matrices, *along, *betas)


class _Rates(ctypes.Structure):
    """Rounded from float64 one by one, as torch rounds its scalars."""

    _fields_ = (
        ("take1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("take2", ctypes.c_float),
    )


@functools.cache
def _kernel(library: ctypes.CDLL) -> Any:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.update_blocks.argtypes = [pointer] * 5 + [size, pointer] + [size] * 4 + [_Rates]
    library.update_blocks.restype = None
    return library.update_blocks


def _run(
    library: ctypes.CDLL,
    tensors: Tensors,
    blocks: Sequence[Rectangle],
    factors: torch.Tensor,
    betas: tuple[float, float],
) -> None:
    """The C kernel, on as many threads as torch uses; a row is computed by one of them."""
    assert factors.is_contiguous()
    table, kernel, rates = np.array(blocks, dtype=np.int64), _kernel(library), _rates(betas)
    # one call for all of them: a call costs as much as updating some ten thousand elements
    arguments = [t.data_ptr() for t in tensors]
    arguments += [table.ctypes.data, len(blocks), factors.data_ptr(), factors.shape[1]]
    parts = torch.get_num_threads()

    def share(first: int, stop: int) -> None:
        kernel(*arguments, first, stop, parts, rates)

    in_parts(share, parts, int(table[:, 1] @ table[:, 2]))


@functools.cache
def _rates(betas: tuple[float, float]) -> _Rates:
    return _Rates(1.0 - betas[0], betas[1], 1.0 - betas[1])


def _step(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    live: torch.Tensor,
    decay: torch.Tensor,
    slope: torch.Tensor,
    shift: torch.Tensor,
    beta1: float,
    beta2: float,
) -> None:
    grad = grad * live
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    p.mul_(decay).sub_(exp_avg / (exp_avg_sq.sqrt() * slope + shift))


@functools.cache
def _compiled() -> Callable[..., None]:
    """`_step` as one kernel; as it is where no compiler is installed."""
    # its compiler takes seconds to import, and processes without a GPU never need it
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    # a kernel per shape is a sixth faster than one for all; there are about three shapes per method
    # and two more where a rank's slice ends, while the compiler gives up after eight
    limit = max(dynamo.recompile_limit, _SHAPES)
    kernel: Callable[..., None] = torch.compile(_step, dynamic=False, fullgraph=True)

    def step(*arguments: Any) -> None:
        nonlocal kernel
        try:
            # settings of the compiler belong to a thread, and updates may run in autograd's
            with dynamo.patch(recompile_limit=limit):
                kernel(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            # raised before anything is computed
            _logger.warning(
                "the optimizer's kernel cannot be compiled, its updates take three times as long: "
                "install a C++ compiler (%s)",
                str(error).partition("\n")[0],
            )
            kernel = _step
            kernel(*arguments)

    return step
