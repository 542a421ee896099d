"""The AdamW update of a matrix whose rows or columns have coefficients of their own.

torch's fused kernel has one step count per tensor, and a rank vector is strided if it is a column.
One pass over memory needs a kernel: on a CPU a few lines of C, elsewhere what torch's compiler
makes of the operations.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import TorchDynamoException

from relora_ds.engine.host_kernels import in_parts, load_kernels

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
    """A matrix that lies in a flat tensor."""

    at: int
    """Offset of its first element."""
    rows: int
    cols: int


def update_block(
    tensors: Tensors,
    block: Rectangle,
    factors: torch.Tensor,
    axis: int,
    betas: tuple[float, float],
) -> None:
    """p = decay * p - m / (sqrt(v) * slope + shift), after m and v took up live * grad. In place.

    Args:
        block: the elements to update.
        factors: (4, vectors), four numbers for each of them. live: 1, or 0 to ignore the gradient;
            decay: factor of the weights; slope: bias correction of the root of v, divided by the
            learning rate; shift: bias-corrected epsilon, divided by it, infinite for no update.
        axis: 0 if the rows are the vectors, 1 if the columns are.
        betas: decay rates of m and v.
    """
    p = tensors.p
    if p.device.type == "cpu" and p.dtype == tensors.grad.dtype == torch.float32:
        library = load_kernels(_SOURCE)
        if library is not None:
            return _run(library, tensors, block, factors, axis, betas)
    at, rows, cols = block
    matrices = [t[at : at + rows * cols].view(rows, cols) for t in tensors]
    along = factors.unsqueeze(2 - axis).unbind()
    # a vector that is one element high has another kernel: not worth it either
    large = p.device.type != "cpu" and rows * cols >= _COMPILED_FROM and min(rows, cols) > 1
    step: Callable[..., None] = _compiled() if large else _step
    return step(*matrices, *along, *betas)


class _Rates(ctypes.Structure):
    """Rounded from float64 one by one, as torch rounds its scalars."""

    _fields_ = (
        ("take1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("take2", ctypes.c_float),
    )


@functools.cache
def _kernels(library: ctypes.CDLL) -> tuple[Any, Any]:
    """For vectors that are rows, and for columns."""
    kernels = library.update_rows, library.update_columns
    for kernel in kernels:
        kernel.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_size_t] * 3 + [_Rates]
        kernel.restype = None
    return kernels


def _run(
    library: ctypes.CDLL,
    tensors: Tensors,
    block: Rectangle,
    factors: torch.Tensor,
    axis: int,
    betas: tuple[float, float],
) -> None:
    """The C kernel, on as many threads as torch uses; a row is computed by one of them."""
    assert factors.stride(1) == 1
    kernel = _kernels(library)[axis]
    rates, (at, rows, cols) = _rates(betas), block
    starts = [t.data_ptr() + 4 * at for t in tensors]
    vectors, apart = factors.data_ptr(), factors.stride(0)

    def part(first: int, stop: int) -> None:
        skip, own = 4 * first * cols, vectors if axis else vectors + 4 * first
        kernel(*(start + skip for start in starts), own, apart, stop - first, cols, rates)

    in_parts(part, rows, rows * cols)


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
    # a kernel per shape is a sixth faster than one for all; there are about three shapes per method
    # and two more where a rank's slice ends, while the compiler gives up after eight
    dynamo.recompile_limit = max(dynamo.recompile_limit, _SHAPES)
    kernel: Callable[..., None] = torch.compile(_step, dynamic=False, fullgraph=True)

    def step(*arguments: Any) -> None:
        nonlocal kernel
        try:
            kernel(*arguments)
        except TorchDynamoException as error:
            # raised before anything is computed
            _logger.warning(
                "the optimizer's kernel cannot be compiled, its updates take three times as long: "
                "install a C++ compiler (%s)",
                str(error).partition("\n")[0],
            )
            kernel = _step
            kernel(*arguments)

    return step
