"""Causal grouped-query attention and the choice of its kernel.

Shape suffixes: B batch, S sequence, D model, N query heads, K key/value heads,
H head dim, R = H / 2.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.model import ModelConfig
from relora_ds.errors import ConfigError
from relora_ds.model.rope import rotate
from relora_ds.parallel.linear import LinearFactory, LinearSpec
from relora_ds.parallel.tensor import SINGLE, TensorParallel

_log = logging.getLogger(__name__)

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256


class Attention(nn.Module):
    """Multi-head causal self-attention; `num_key_value_heads` < `num_attention_heads` shares keys.

    Args:
        config: architecture.
        linear: builds the four projections.
        name: full module name, such as ``model.layers.0.self_attn``.
        backend: ``"auto"``, ``"flash"`` or ``"sdpa"``.
        tp: processes that share the heads; their number divides that of the key/value heads.

    Raises:
        ConfigError: `backend` is unknown, or is ``"flash"`` and this machine cannot run it. What
            depends on the input (its device and dtype) is checked at the first forward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        linear: LinearFactory,
        name: str,
        backend: str = "auto",
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.tp = tp
        check_backend(backend, config.head_dim)
        self.backend = backend
        self.head_dim = config.head_dim
        self.query_width = config.num_attention_heads * config.head_dim
        width, query, bias = config.hidden_size, self.query_width, config.attention_bias
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(LinearSpec(f"{name}.q_proj", width, query, bias, "column", tp))
        self.k_proj = linear(LinearSpec(f"{name}.k_proj", width, kv, bias, "column", tp))
        self.v_proj = linear(LinearSpec(f"{name}.v_proj", width, kv, bias, "column", tp))
        self.o_proj = linear(LinearSpec(f"{name}.o_proj", query, width, bias, "row", tp))

    def forward(
        self, x_BSD: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D); the tables come from `rope.rotary_tables`.

        Raises:
            ConfigError: ``"flash"`` was asked for and the input's device or dtype
                does not allow it.
        """
        # -1: a column-parallel projection returns only the heads of this process
        heads = (-1, self.head_dim)
        x_BSD = self.tp.enter(x_BSD)
        q_BSNH = rotate(self.q_proj(x_BSD).unflatten(-1, heads), cos_SR, sin_SR)
        k_BSKH = rotate(self.k_proj(x_BSD).unflatten(-1, heads), cos_SR, sin_SR)
        v_BSKH = self.v_proj(x_BSD).unflatten(-1, heads)
        kernel = select_kernel(self.backend, q_BSNH.device, q_BSNH.dtype, self.head_dim)
        attend = _flash if kernel == "flash" else _sdpa
        return self.o_proj(attend(q_BSNH, k_BSKH, v_BSKH).flatten(-2))


def _sdpa(q_BSNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor) -> torch.Tensor:
    out_BNSH = F.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BSNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNSH.transpose(1, 2)


def _flash(q_BSNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor) -> torch.Tensor:
    function, _ = _load_flash()
    assert function is not None, "select_kernel returned flash without the package"
    # The fast backward pass adds with atomics; torch's own kernels obey the same global switch.
    deterministic = torch.are_deterministic_algorithms_enabled()
    return function(q_BSNH, k_BSKH, v_BSKH, causal=True, deterministic=deterministic)


def check_backend(backend: str, head_dim: int) -> None:
    """Reject a backend that can be seen to fail before any input exists.

    Raises:
        ConfigError: `backend` is unknown, or ``"flash"`` cannot run on this machine.
    """
    if backend not in ("auto", "flash", "sdpa"):
        raise ConfigError(f"train.attention is {backend!r}; use auto, flash or sdpa")
    if backend != "flash":
        return
    missing = _missing_here(head_dim)
    if missing:
        raise _flash_error(missing)


def select_kernel(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Literal["flash", "sdpa"]:
    """The kernel that serves queries of this device and dtype; each choice is logged once.

    Raises:
        ConfigError: `backend` is ``"flash"`` and something it needs is missing.
    """
    kernel, missing = _choose(backend, device.type, dtype, head_dim)
    if backend == "flash" and missing:
        raise _flash_error(missing)
    return kernel


@cache
def _choose(
    backend: str, device_type: str, dtype: torch.dtype, head_dim: int
) -> tuple[Literal["flash", "sdpa"], tuple[str, ...]]:
    """The kernel and what flash-attn lacks for it. Cached: it logs, and a layer asks every step."""
    if backend == "sdpa":
        missing, reason = (), "asked for"
    else:
        missing = tuple(_missing_for(device_type, dtype) + _missing_here(head_dim))
        reason = (
            f"flash-attn is not used: {'; '.join(missing)}" if missing else "flash-attn can run"
        )
    kernel = "sdpa" if missing or backend == "sdpa" else "flash"
    if not (backend == "flash" and missing):
        _log.info("attention kernel for %s %s: %s (%s)", device_type, dtype, kernel, reason)
    return kernel, missing


def _missing_for(device_type: str, dtype: torch.dtype) -> list[str]:
    missing = []
    if device_type != "cuda":
        missing.append(f"a CUDA tensor (got {device_type})")
    if dtype not in _FLASH_DTYPES:
        missing.append(f"fp16 or bf16 (got {dtype})")
    return missing


def _missing_here(head_dim: int) -> list[str]:
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA device")
    function, problem = _load_flash()
    if function is None:
        missing.append(f"the package flash-attn ({problem})")
    if head_dim > _FLASH_MAX_HEAD_DIM:
        missing.append(f"a head_dim of at most {_FLASH_MAX_HEAD_DIM} (got {head_dim})")
    return missing


def _flash_error(missing: list[str] | tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"train.attention is 'flash', which needs {'; '.join(missing)}. "
        "Provide it, or set train.attention to auto or sdpa"
    )


@cache
def _load_flash() -> tuple[Callable[..., torch.Tensor] | None, str]:
    """flash-attn's function, or None and why it cannot be imported."""
    try:
        module = importlib.import_module("flash_attn")
        return cast(Callable[..., torch.Tensor], module.flash_attn_func), ""
    except (ImportError, OSError, AttributeError) as error:
        # a wheel built for another torch lacks a symbol: ImportError, not ModuleNotFoundError
        return None, str(error)
