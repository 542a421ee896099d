"""Cross-entropy of a linear head without ever holding the logits of all tokens.

The head is applied to some hundred or thousand tokens at a time. While training, the gradients of
those tokens are taken at once, so that their logits can be dropped before the next ones are made;
the backward pass only scales what is already there.

Shape suffixes: T tokens, C tokens of one chunk, D model, V vocab.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from relora_ds.numerics.products import Place, matmul, place_of
from relora_ds.parallel.tensor import TensorParallel

IGNORE = -100
"""Target that contributes neither loss nor gradient (the value torch uses)."""

_CHUNK_BYTES = {"cuda": 256 << 20}
"""Bytes of a chunk's logits. Each chunk passes over the whole gradient of the head, which takes a
GPU longer than the products of a few hundred tokens."""
_HOST_CHUNK_BYTES = 32 << 20


def chunk_rows(vocab_size: int, device: str = "cpu") -> int:
    """Tokens per chunk: fp32 logits of at most 32 MiB, on a GPU 256 MiB, and a multiple of 64 where
    there is room.

    Args:
        vocab_size: columns of the logits.
        device: type of the device that computes.
    """
    rows = max(1, _CHUNK_BYTES.get(device, _HOST_CHUNK_BYTES) // (4 * vocab_size))
    return rows - rows % 64 if rows > 64 else rows


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    divisor: int = 1,
    rows: int | None = None,
    vocabulary: VocabularySplit | None = None,
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[target], divided by `divisor`.

    The matrix products run in the inputs' dtype, softmax and loss in fp32 (fp64 for fp64 inputs).
    The weight's gradient is summed over chunks in fp32 as well. Not differentiable twice.

    Args:
        hidden_TD: inputs of the head, any float dtype.
        weight_VD: the head, same dtype as `hidden_TD`.
        targets_T: int64 in [0, V), or `IGNORE`.
        divisor: T for the mean over all tokens, 1 for the sum.
        rows: tokens per chunk; default `chunk_rows` of V and the device.
        vocabulary: set where `weight_VD` is this rank's rows of the head. The loss is then the same
            on every rank, and the gradient of the inputs is this rank's share of a sum.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).
    """
    rows = rows or chunk_rows(weight_VD.shape[0], weight_VD.device.type)
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        loss = _LinearCrossEntropy.apply(
            hidden_TD, weight_VD, targets_T, 1.0 / divisor, rows, vocabulary
        )
        assert isinstance(loss, torch.Tensor)
        return loss
    grads = _Gradients(None, None, 1.0 / divisor)
    return _run(hidden_TD, weight_VD, targets_T, grads, rows, vocabulary)


@dataclass(frozen=True)
class VocabularySplit:
    """Which columns of the logits this tensor-parallel rank computes: [start, stop)."""

    tp: TensorParallel
    start: int
    stop: int

    def find(self, target_C1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the targets on this rank, 0 where they are on another, and which are here."""
        here_C1 = (target_C1 >= self.start) & (target_C1 < self.stop)
        return (target_C1 - self.start).masked_fill(~here_C1, 0), here_C1

    def complete(
        self, sums_C1: torch.Tensor, target_logit_C1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over this rank's columns and logits of the targets, 0 where they are on another
        rank, become those of the whole vocabulary, by one all-reduce."""
        both = self.tp.sum(torch.stack([sums_C1, target_logit_C1]))
        return both[0], both[1]


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss with the gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        scale: float,
        rows: int,
        vocabulary: VocabularySplit | None,
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = _wide(weight_VD.dtype)
        grads = _Gradients(
            torch.empty_like(hidden_TD) if wants_hidden else None,
            torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None,
            scale,
        )
        loss = _run(hidden_TD, weight_VD, targets_T, grads, rows, vocabulary)
        weight_grad = None if grads.weight is None else grads.weight.to(weight_VD.dtype)
        ctx.save_for_backward(grads.hidden, weight_grad)
        ctx.place = place_of(weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD = (
            None if saved is None else _scaled(saved, grad, place)
            for saved, place in zip(ctx.saved_tensors, (None, ctx.place), strict=True)
        )
        return hidden_TD, weight_VD, None, None, None, None


def _scaled(saved: torch.Tensor, grad: torch.Tensor, place: Place | None) -> torch.Tensor:
    # In grad's fp32: a factor such as 1/3 (gradient accumulation) would be off by 0.2 % in bf16.
    # Always a product: looking whether the factor is 1 would wait for the device.
    out = None if place is None else place()
    product = torch.empty_like(saved) if out is None else out
    return torch.mul(saved, grad.view(1), out=product)


@dataclass
class _Gradients:
    """Gradients of (sum of losses) * scale; None where nobody wants one.

    Args:
        hidden: (T, D), working dtype.
        weight: (V, D), fp32 or wider; summed over the chunks.
        scale: factor of the loss.
    """

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    scale: float

    def add(
        self,
        chunk: slice,
        logit_grad_CV: torch.Tensor,
        hidden_CD: torch.Tensor,
        weight_VD: torch.Tensor,
    ) -> None:
        """Take in one chunk. `logit_grad_CV` already has the working dtype."""
        if self.hidden is not None:
            torch.mm(logit_grad_CV, weight_VD, out=self.hidden[chunk])
        if self.weight is None:
            return
        if self.weight.dtype == hidden_CD.dtype:
            self.weight.addmm_(logit_grad_CV.t(), hidden_CD)
        elif _adds_widely(self.weight.device, hidden_CD.dtype):
            _add_product(self.weight, logit_grad_CV.t(), hidden_CD)
        else:
            self.weight.add_(logit_grad_CV.t() @ hidden_CD)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right with fp32 `total` and half-precision factors, in one pass over `total`
    and without rounding the product to their dtype."""
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


@cache
def _adds_widely(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `_add_product` can be computed there; only torch's CUDA builds have a kernel, not all
    of them with a wide sum. Tried, once."""
    if device.type != "cuda":
        return False
    total = torch.zeros(16, 16, device=device)
    factor = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        _add_product(total, factor, factor)
    except RuntimeError:  # a check of torch's on dtypes, or no kernel
        return False
    return True


def _run(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    grads: _Gradients,
    rows: int,
    vocabulary: VocabularySplit | None,
) -> torch.Tensor:
    """The scaled sum of losses; fills `grads` if it wants anything. Runs outside of autograd."""
    wide = _wide(hidden_TD.dtype)
    wants_grads = grads.hidden is not None or grads.weight is not None
    losses = []
    for start in range(0, hidden_TD.shape[0], rows):
        chunk = slice(start, start + rows)
        hidden_CD, targets_C = hidden_TD[chunk], targets_T[chunk]
        kept_C1 = (targets_C != IGNORE).unsqueeze(1)
        target_C1 = targets_C.unsqueeze(1).clamp_min(0)  # an ignored token reads column 0, times 0
        logits_CV = matmul(hidden_CD, weight_VD.t()).to(wide)
        top_C1, here_C1 = logits_CV.amax(1, keepdim=True), None
        if vocabulary is not None:
            top_C1 = vocabulary.tp.max(top_C1)
            target_C1, here_C1 = vocabulary.find(target_C1)
        target_logit_C1 = logits_CV.gather(1, target_C1)
        # in place from here on: what remains of the logits is taken once, for loss and gradients
        sums_C1 = logits_CV.sub_(top_C1).exp_().sum(1, keepdim=True)
        if vocabulary is not None and here_C1 is not None:
            sums_C1, target_logit_C1 = vocabulary.complete(sums_C1, target_logit_C1 * here_C1)
        losses_C1 = sums_C1.log() + top_C1 - target_logit_C1
        losses.append((losses_C1 * kept_C1).sum())
        if wants_grads:
            scale_C1 = kept_C1 * grads.scale
            logits_CV.mul_(scale_C1 / sums_C1)
            at_target_C1 = torch.expm1(-losses_C1).mul_(scale_C1)  # p - 1 where p = exp(-loss)
            if here_C1 is not None:
                at_target_C1 = torch.where(here_C1, at_target_C1, logits_CV.gather(1, target_C1))
            logits_CV.scatter_(1, target_C1, at_target_C1)
            grads.add(chunk, logits_CV.to(hidden_TD.dtype), hidden_CD, weight_VD)
    total = torch.stack(losses).sum() if losses else hidden_TD.new_zeros((), dtype=wide)
    return total * grads.scale


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, loss and sums."""
    return torch.promote_types(dtype, torch.float32)
