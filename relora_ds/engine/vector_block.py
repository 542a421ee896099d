"""The AdamW update of a matrix whose rows or columns have coefficients of their own.

torch's fused kernel has one step count per tensor, and a rank vector is strided if it is a column.
A large matrix therefore goes through a kernel that torch's compiler makes: one pass over memory,
where the same operations one after the other take seven. Small ones are not worth its compilation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import TorchDynamoException

_SHAPES = 64
_logger = logging.getLogger(__name__)
_COMPILED_FROM = 1 << 15
"""Elements; by the size alone, so that a resumed run computes with the same kernel."""


def update_block(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    live: torch.Tensor,
    decay: torch.Tensor,
    slope: torch.Tensor,
    shift: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
) -> None:
    """p = decay * p - m / (sqrt(v) * slope + shift), after m and v took up live * grad. In place.

    Args:
        p: (rows, cols), as the next three, all contiguous and of one dtype.
        grad: gradient; kept.
        exp_avg: first moment m.
        exp_avg_sq: second moment v.
        live: (rows, 1) or (1, cols), as the next three; 1, or 0 to ignore the gradient.
        decay: factor of the weights.
        slope: bias correction of the root of v, divided by the learning rate.
        shift: bias-corrected epsilon, divided by it; infinite for no update.
        beta1: decay rate of m.
        beta2: decay rate of v.
    """
    # a vector that is one element high has another kernel: not worth it either
    large = p.numel() >= _COMPILED_FROM and min(p.shape) > 1
    step = _compiled() if large else _step
    step(p, grad, exp_avg, exp_avg_sq, live, decay, slope, shift, beta1, beta2)


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
