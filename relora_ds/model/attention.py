"""Causal grouped-query attention.

Shape suffixes: B batch, S sequence, D model, N query heads, K key/value heads,
H head dim, R = H / 2.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

import torch
from torch import nn

from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.model.attention_kernels import check_backend, select_kernel
from relora_ds.model.documents import Documents
from relora_ds.model.rope import rotate, rotate_compiled
from relora_ds.numerics.dtypes import DTYPES
from relora_ds.parallel.linear import LinearFactory, LinearSpec
from relora_ds.parallel.tensor import SINGLE, TensorParallel


class Attention(nn.Module):
    """Multi-head causal self-attention; `num_key_value_heads` < `num_attention_heads` shares keys.

    Args:
        config: architecture.
        linear: builds the four projections.
        name: full module name, such as ``model.layers.0.self_attn``.
        backend: a value of `train.attention`.
        tp: processes that share the heads; their number divides that of the key/value heads.

    Raises:
        ConfigError: `backend` is unknown, or this machine cannot run it. What depends on the input
            (its device and dtype) is checked at the first forward pass.
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
        self.compiled = False
        """Whether torch's compiler makes the kernels around attention in training."""
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
        self,
        x_BSD: torch.Tensor,
        cos_SR: torch.Tensor,
        sin_SR: torch.Tensor,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D); the tables come from `rope.rotary_tables`.

        Args:
            x_BSD: hidden states.
            cos_SR: of every position, or (B, S, R).
            sin_SR: likewise.
            documents: where attention ends; default: every sequence is one document.

        Raises:
            ConfigError: a kernel was asked for by name, and the input's device or dtype does not
                allow it.
        """
        # -1: a column-parallel projection returns only the heads of this process
        heads = (-1, self.head_dim)
        x_BSD = self.tp.enter(x_BSD)
        turn = rotate_compiled if self.compiled and self.training else rotate
        q_BSNH = turn(self.q_proj(x_BSD).unflatten(-1, heads), cos_SR, sin_SR)
        k_BSKH = turn(self.k_proj(x_BSD).unflatten(-1, heads), cos_SR, sin_SR)
        v_BSKH = self.v_proj(x_BSD).unflatten(-1, heads)
        grouped = q_BSNH.shape[2] != k_BSKH.shape[2]
        place = q_BSNH.device, q_BSNH.dtype, self.head_dim
        kernel = select_kernel(self.backend, *place, grouped, documents is not None)
        return self.o_proj(kernel.attend(q_BSNH, k_BSKH, v_BSKH, documents).flatten(-2))


def check_attention(
    train: TrainConfig, architecture: ModelConfig, device: torch.device, documents: bool = False
) -> None:
    """Choose the kernel of a run on this device, before anything is built.

    Args:
        train: names the kernel and the dtype.
        architecture: of the model.
        device: that it computes on.
        documents: whether attention ends at the end of a document.

    Raises:
        ConfigError: `train.attention` names a kernel that cannot serve the run here.
    """
    dtype = DTYPES[train.precision]
    grouped = architecture.num_key_value_heads != architecture.num_attention_heads
    select_kernel(train.attention, device, dtype, architecture.head_dim, grouped, documents)
