"""The kernels that can compute causal attention, and the choice among them.

| `train.attention` | kernel                                            | deterministic |
|-------------------|---------------------------------------------------|---------------|
| `sdpa`            | torch picks one of its own; on GPUs of compute    | on request    |
|                   | capability 9 and up it tries cuDNN's first        |               |
| `cudnn`           | cuDNN's, through torch                            | no            |
| `flash`           | the package flash-attn (2)                        | on request    |
| `fa4`             | the package flash-attn-4, through torch's switch  | on request    |
| `math`            | plain matrix products, without fusion             | always        |

On request: where `torch.use_deterministic_algorithms` is on. The fast backward passes add with
atomics. torch then leaves cuDNN out, so flash comes first.

Where documents are kept apart, `flash`, `fa4`, and `sdpa` on GPUs in half precision, take sequences
of several lengths; the others, and `sdpa` elsewhere, a mask.

Shape suffixes are those of `attention`.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from relora_ds.errors import ConfigError
from relora_ds.model.documents import (
    Documents,
    Varlen,
    flash_lengths,
    load_varlen,
    torch_lengths,
)

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "flash", "fa4", "cudnn", "sdpa", "math")
_GPU_BACKENDS = ("flash", "fa4", "cudnn")
_HALF = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256
_HOPPER = 9  # compute capability from which cuDNN's kernel is the fastest that torch ships
_TRIAL_LENGTH = 128

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents | None], torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """How attention is computed.

    Args:
        name: ``"flash"``, ``"fa4"``, ``"cudnn"``, ``"sdpa"`` or ``"math"``.
        attend: from queries (B, S, N, H), keys and values (B, S, K, H) to outputs (B, S, N, H),
            within documents where these are given.
    """

    name: str
    attend: Attend


def check_backend(backend: str, head_dim: int) -> None:
    """Reject a backend that can be seen to fail before any input exists.

    Raises:
        ConfigError: `backend` is unknown, or this machine cannot run it.
    """
    if backend not in BACKENDS:
        options = f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"
        raise ConfigError(f"train.attention is {backend!r}; use {options}")
    if backend in _GPU_BACKENDS:
        _require(backend, _missing_here(backend, head_dim))


def select_kernel(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    grouped: bool = False,
    documents: bool = False,
) -> Kernel:
    """The kernel for queries of this device and dtype. Each choice is made and logged once.

    Args:
        backend: a value of `train.attention`.
        device: of the queries.
        dtype: of the queries.
        head_dim: H.
        grouped: whether there are fewer key/value heads than query heads.
        documents: whether attention ends at the end of a document.

    Raises:
        ConfigError: `backend` was asked for by name, and something that it needs is missing.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _select(backend, device, dtype, head_dim, grouped, deterministic, documents)


@cache
def _select(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    grouped: bool,
    deterministic: bool,
    documents: bool,
) -> Kernel:
    """Cached: a layer asks at every step. An error is not kept."""
    reason = "asked for"
    if backend in _GPU_BACKENDS:
        missing = _missing_for(device.type, dtype) + _missing_here(backend, head_dim)
        if backend == "cudnn" and deterministic:
            missing.append("train.deterministic to be false (its backward pass adds in any order)")
        _require(backend, missing)
        kernel = _named(backend)
        if documents:
            kernel = _by_lengths(kernel, dtype)
        _try(kernel, device, dtype, head_dim, grouped, documents)
    elif backend == "math":
        kernel = Kernel("math", _Sdpa((SDPBackend.MATH,)))
    else:
        kernel = sdpa = Kernel("sdpa", _Sdpa(_priority(device, deterministic)))
        if backend == "auto":
            kernel, reason = _automatic(sdpa, device, dtype, head_dim)
        if documents and device.type == "cuda":
            kernel, more = _for_documents(kernel, sdpa, device, dtype, head_dim, grouped)
            reason += more
    if isinstance(kernel.attend, _Sdpa) and kernel.name == "sdpa" and device.type == "cuda":
        reason += f"; torch takes {_torch_choice(kernel, device, dtype, head_dim, grouped)}"
    _log.info("attention kernel for %s %s: %s (%s)", device.type, dtype, kernel.name, reason)
    return kernel


def _automatic(
    sdpa: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[Kernel, str]:
    """flash-attn where it can run and is faster than what torch ships; and why."""
    missing = _missing_for(device.type, dtype) + _missing_here("flash", head_dim)
    if missing:
        return sdpa, f"flash-attn is not used: {'; '.join(missing)}"
    if _capability(device) >= _HOPPER:
        return sdpa, "torch's own kernels are faster than flash-attn 2 on this GPU"
    return _named("flash"), "flash-attn can run"


def _for_documents(
    kernel: Kernel,
    sdpa: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    grouped: bool,
) -> tuple[Kernel, str]:
    """The kernel as it takes sequences of several lengths, if it can, or else torch's with a mask;
    and which."""
    quick = _by_lengths(kernel, dtype)
    if isinstance(quick.attend, _Lengths):
        try:
            _try(quick, device, dtype, head_dim, grouped, True)
        except ConfigError:
            return sdpa, "; documents by a mask, for they cannot be told by their lengths here"
        return quick, "; documents by their lengths"
    return sdpa, "; documents by a mask"


def _by_lengths(kernel: Kernel, dtype: torch.dtype) -> Kernel:
    """The kernel as it takes sequences of several lengths, or itself where it takes a mask."""
    if kernel.name == "flash":
        return Kernel("flash", _Lengths(flash_lengths))
    if kernel.name in ("fa4", "sdpa") and dtype in _HALF and load_varlen() is not None:
        return Kernel(kernel.name, _Lengths(torch_lengths))
    return kernel


def _named(backend: str) -> Kernel:
    if backend == "flash":
        return Kernel("flash", _flash)
    if backend == "fa4":
        return Kernel("fa4", _Sdpa((SDPBackend.FLASH_ATTENTION,)))
    return Kernel("cudnn", _Sdpa((SDPBackend.CUDNN_ATTENTION,)))


def _priority(device: torch.device, deterministic: bool) -> tuple[SDPBackend, ...]:
    """The order in which torch tries its kernels; empty for its own order."""
    if device.type != "cuda" or _capability(device) < _HOPPER:
        return ()
    rest = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return rest if deterministic else (SDPBackend.CUDNN_ATTENTION, *rest)


@dataclass(frozen=True)
class _Sdpa:
    """torch's scaled dot product attention with these kernels, in this order of preference."""

    order: Sequence[SDPBackend]

    def __call__(
        self,
        q_BSNH: torch.Tensor,
        k_BSKH: torch.Tensor,
        v_BSKH: torch.Tensor,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        if not self.order:
            return _sdpa(q_BSNH, k_BSKH, v_BSKH, documents)
        with self.preferred():
            return _sdpa(q_BSNH, k_BSKH, v_BSKH, documents)

    def preferred(self) -> AbstractContextManager[object]:
        """Within it, torch tries these kernels alone and in this order."""
        return sdpa_kernel(list(self.order), set_priority=True) if self.order else nullcontext()


def _sdpa(
    q_BSNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    documents: Documents | None = None,
) -> torch.Tensor:
    out_BNSH = F.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=None if documents is None else documents.mask,
        is_causal=documents is None,
        enable_gqa=q_BSNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNSH.transpose(1, 2)


@dataclass(frozen=True)
class _Lengths:
    """Attention within documents by a kernel for sequences of several lengths."""

    function: Varlen

    def __call__(
        self,
        q_BSNH: torch.Tensor,
        k_BSKH: torch.Tensor,
        v_BSKH: torch.Tensor,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        assert documents is not None, "the kernel was selected for documents"
        return documents.attend(self.function, q_BSNH, k_BSKH, v_BSKH)


def _flash(
    q_BSNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    documents: Documents | None = None,
) -> torch.Tensor:
    assert documents is None, "documents take flash-attn's function for lengths"
    function, _ = _load_flash()
    assert function is not None, "flash was selected without the package"
    # torch's own kernels obey the same global switch
    deterministic = torch.are_deterministic_algorithms_enabled()
    return function(q_BSNH, k_BSKH, v_BSKH, causal=True, deterministic=deterministic)


def _missing_for(device_type: str, dtype: torch.dtype) -> list[str]:
    missing = []
    if device_type != "cuda":
        missing.append(f"a CUDA tensor (got {device_type})")
    if dtype not in _HALF:
        missing.append(f"fp16 or bf16 (got {dtype})")
    return missing


def _missing_here(backend: str, head_dim: int) -> list[str]:
    """What this machine lacks for a kernel that is asked for by name."""
    missing = []
    if not _computes_on_cuda():
        missing.append("a CUDA device")
    if backend == "flash":
        function, problem = _load_flash()
        if function is None:
            missing.append(f"the package flash-attn ({problem})")
        if head_dim > _FLASH_MAX_HEAD_DIM:
            missing.append(f"a head_dim of at most {_FLASH_MAX_HEAD_DIM} (got {head_dim})")
    if backend == "fa4":
        problem = _activate_fa4()
        if problem:
            missing.append(f"the package flash-attn-4 ({problem})")
    return missing


def _computes_on_cuda() -> bool:
    """Whether models of this process live on a GPU: DS_ACCELERATOR=cpu leaves those that are there
    alone."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def _require(backend: str, missing: list[str]) -> None:
    if missing:
        raise ConfigError(
            f"train.attention is {backend!r}, which needs {'; '.join(missing)}. "
            "Provide it, or set train.attention to auto or sdpa"
        )


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@cache
def _load_flash() -> tuple[Callable[..., torch.Tensor] | None, str]:
    """flash-attn's function, or None and why it cannot be imported."""
    try:
        module = importlib.import_module("flash_attn")
        return cast(Callable[..., torch.Tensor], module.flash_attn_func), ""
    except (ImportError, OSError, AttributeError) as error:
        # a wheel built for another torch lacks a symbol: ImportError, not ModuleNotFoundError
        return None, str(error)


@cache
def _activate_fa4() -> str:
    """Have torch's flash kernel be FlashAttention 4's, in the whole process; or why it cannot."""
    try:
        torch_attention.activate_flash_attention_impl("FA4")
    except (ImportError, OSError, AttributeError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def _heads(
    device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small queries, keys and values. Zeros: no generator is touched."""
    q_BSNH = torch.zeros(1, _TRIAL_LENGTH, 2, head_dim, device=device, dtype=dtype)
    k_BSKH = q_BSNH[:, :, :1].clone() if grouped else q_BSNH.clone()
    return q_BSNH, k_BSKH, k_BSKH.clone()


def _try(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    grouped: bool,
    documents: bool = False,
) -> None:
    """Run a kernel once in both directions: only it knows all its conditions."""
    with torch.inference_mode(False), torch.enable_grad():
        q_BSNH, k_BSKH, v_BSKH = (
            each.requires_grad_() for each in _heads(device, dtype, head_dim, grouped)
        )
        apart = None
        if documents:
            ids_BS = torch.arange(_TRIAL_LENGTH, device=device).unsqueeze(0)
            apart = Documents(ids_BS, end=_TRIAL_LENGTH // 3)
        try:
            kernel.attend(q_BSNH, k_BSKH, v_BSKH, apart).sum().backward()
        except (RuntimeError, ValueError, AssertionError) as error:
            # torch and CUDA raise the first; flash-attn 2 and 4 check shapes and dtypes in Python,
            # by the second and by assertions
            heads = f"{'grouped ' if grouped else ''}heads of {head_dim} in {dtype}"
            raise ConfigError(
                f"train.attention is {kernel.name!r}, which cannot compute {heads} on "
                f"{torch.cuda.get_device_name(device)}: {str(error).splitlines()[0]}. "
                "Set train.attention to auto or sdpa"
            ) from error


def _torch_choice(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool
) -> str:
    """The name of the kernel that torch takes, for the log."""
    choose = getattr(torch, "_fused_sdp_choice", None)  # without a public name
    if choose is None:
        return "what it prefers"
    q, k, v = (each.transpose(1, 2) for each in _heads(device, dtype, head_dim, grouped))
    with cast(_Sdpa, kernel.attend).preferred():
        number = choose(q, k, v, is_causal=True, enable_gqa=grouped)
    return SDPBackend(number).name.lower()
