"""The AdamW update of matrices whose rows or columns have coefficients of their own.

torch's fused kernel has one step count per tensor, and a rank vector is strided if it is a column.
One pass over memory needs a kernel: on a CPU a few lines of C. On a GPU one in Triton updates a
whole tensor, whatever its moments are kept in; without Triton torch's compiler makes what it can of
the operations.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from relora_ds.numerics.gpu import launch
from relora_ds.numerics.host.kernels import ieee_roots, in_parts, load_kernels
from relora_ds.numerics.transfers import upload
from relora_ds.optim.vector_clock import Fragment
from relora_ds.randomness import Stream

_KERNEL_TYPES = {torch.float32, torch.bfloat16}
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
    on_host = p.device.type == "cpu"
    has_kernel = on_host and p.dtype == tensors.grad.dtype == torch.float32
    library = load_kernels(_SOURCE) if has_kernel else None
    if library is not None:
        return _run(library, tensors, blocks, factors, betas)
    plain = _step_as_in_c if has_kernel else _step
    for at, rows, cols, axis, first in blocks:
        matrices = [t[at : at + rows * cols].view(rows, cols) for t in tensors]
        along = factors[:, first : first + (rows, cols)[axis]].unsqueeze(2 - axis).unbind()
        # a vector that is one element high has another kernel: not worth it either
        large = not on_host and rows * cols >= _COMPILED_FROM and min(rows, cols) > 1
        step: Callable[..., None] = _compiled() if large else plain
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


def _step_as_in_c(
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
    """`_step` in fp32 on the host with every rounding of the C kernel: a run that goes on without a
    compiler is the same run bit for bit. `lerp_` and `addcmul_` may fuse a product and a sum."""
    grad = grad * live
    exp_avg.add_((grad - exp_avg).mul_(1.0 - beta1))
    exp_avg_sq.mul_(beta2).add_((grad * (1.0 - beta2)).mul_(grad))
    root = ieee_roots(exp_avg_sq.clone())
    p.mul_(decay).sub_(exp_avg / root.mul_(slope).add_(shift))


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


class WholeUpdates:
    """Updates of whole flat tensors by one kernel each; remembers where their vectors lie."""

    def __init__(self) -> None:
        self._placed: dict[int, tuple[list[Fragment], torch.Tensor]] = {}

    def serve(
        self,
        p: torch.Tensor,
        grad: torch.Tensor,
        moment: torch.Tensor,
        fragments: list[Fragment],
        completed: int,
    ) -> bool:
        """Whether the kernel is to update a tensor. Where its elements are of one age, and they and
        their moments in fp32, torch's own kernel is as good.

        Args:
            moment: the first one as it is kept.
            fragments: what has a clock.
            completed: updates of the tensor before this one.
        """
        if not launch.usable(p.device) or not {p.dtype, grad.dtype} <= _KERNEL_TYPES:
            return False
        if moment.device != p.device or not p.numel():
            return False
        plain = p.dtype == moment.dtype == torch.float32
        return not plain or any(f.clock.common_birth(completed) is None for f in fragments)

    def update(
        self,
        tensors: Tensors,
        scales: Sequence[torch.Tensor | None],
        fragments: list[Fragment],
        completed: int,
        group: Mapping[str, Any],
        scale: torch.Tensor | None,
        stream: Stream | None,
    ) -> None:
        """One AdamW update in place.

        Args:
            tensors: moments are in fp32 or in codes.
            scales: of the blocks of both moments' codes.
            fragments: what has a clock, in order of offset.
            completed: updates of the tensor before this one.
            group: `lr`, `betas`, `eps` and `weight_decay`.
            scale: fp32 scalar that the gradient is multiplied by.
            stream: draws by which a bf16 tensor is rounded.
        """
        from relora_ds.numerics.gpu import adamw as kernels  # needs Triton

        device, length = tensors.p.device, tensors.p.numel()
        key = tensors.p.data_ptr()
        placed = self._placed.get(key)
        if placed is None or placed[0] != fragments:
            table = upload(torch.from_numpy(_stretches(fragments, length)), device)
            self._placed[key] = placed = fragments, table
        # each stretch without a clock is a vector of the tensor's own age
        alone = np.zeros((2, len(placed[1])), dtype=np.int32)
        times = np.concatenate([*(each.clock.times for each in fragments), alone], axis=1)
        oldest = completed + 1 - int(times[0].min())
        betas, lr = group["betas"], group["lr"]
        rates = [lr or 1.0, group["eps"] / lr if lr else math.inf, 1.0 - lr * group["weight_decay"]]
        ages = kernels.Ages(
            placed[1],
            upload(torch.from_numpy(times), device),
            _corrections_on(device, *betas, 1 << oldest.bit_length()),
        )
        moments = zip((tensors.exp_avg, tensors.exp_avg_sq), scales, strict=True)
        first, second = (kernels.Moment(*each) for each in moments)
        sent = upload(torch.tensor(rates, dtype=torch.float64), device)
        kernels.update(
            *(tensors.p, tensors.grad, (first, second), ages, completed + 1),
            *(sent, betas, scale, stream),
        )


def rectangles_of(fragments: Sequence[Fragment]) -> Iterator[Rectangle]:
    """The rectangles of fragments; the vectors of one clock after the other."""
    before = 0
    for fragment in fragments:
        axis = fragment.clock.axis
        for at, row, col, rows, width in fragment.rectangles:
            yield Rectangle(at, rows, width, axis, before + (col if axis else row))
        before += fragment.clock.count


@functools.lru_cache(maxsize=4)
def corrections(beta1: float, beta2: float, ages: int) -> tuple[np.ndarray, np.ndarray]:
    """c1 / sqrt(c2) and c1 for every age below `ages`, where c is 1 - beta^age; float64."""
    age = np.arange(ages, dtype=np.float64)
    c1, c2 = 1.0 - beta1**age, 1.0 - beta2**age
    c2[0] = 1.0  # no vector has the age zero
    return c1 / np.sqrt(c2), c1


@functools.lru_cache(maxsize=4)
def _corrections_on(device: torch.device, beta1: float, beta2: float, ages: int) -> torch.Tensor:
    """`corrections` on a device, (2, ages)."""
    return torch.from_numpy(np.stack(corrections(beta1, beta2, ages))).to(device)


def _stretches(fragments: Sequence[Fragment], length: int) -> np.ndarray:
    """Stretches of a flat tensor, as `numerics.gpu.adamw.Ages` has them; vectors of the fragments
    come first, and each stretch between fragments is a vector of its own behind them."""
    rows: list[tuple[int, ...]] = []
    alone, at = sum(fragment.clock.count for fragment in fragments), 0
    for start, height, width, axis, first in (
        *rectangles_of(fragments),
        Rectangle(length, 0, 0, 0, 0),
    ):
        if at < start:
            rows.append((at, start, 1, 2, alone))
            alone += 1
        at = start + height * width
        if height:
            rows.append((start, at, width, axis, first))
    return np.array(rows, dtype=np.int64)
