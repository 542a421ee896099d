"""The forward pass over a few new tokens, with keys and values of earlier ones kept.

It is the pass of `llama` and `attention` without what training needs: one process, no gradients, no
choice of kernels. Shape suffixes: B batch, S new tokens, T all tokens so far, D model, N query
heads, K key/value heads, H head dim, R half of it, V vocab.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

from typing import cast

import torch
from torch.nn import functional as F

from relora_ds.model.attention import Attention
from relora_ds.model.llama import DecoderLayer, Llama
from relora_ds.model.rope import rotary_tables, rotate


class CachedModel:
    """A model that reads its input piece by piece.

    Args:
        model: whole on this process.
        batch: sequences that are read together, B.
        length: most tokens of a sequence.
    """

    def __init__(self, model: Llama, batch: int, length: int) -> None:
        self.model = model
        self.length = 0
        """Tokens read so far, T."""
        config, weight = model.config, model.model.norm.weight
        shape = (2, batch, config.num_key_value_heads, length, config.head_dim)
        self._kept = [weight.new_empty(shape) for _ in range(config.num_hidden_layers)]
        rope = config.head_dim, config.rope_theta, length, weight.device, config.rope_scaling
        self._tables = rotary_tables(*rope)

    @torch.no_grad()
    def read(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Read further tokens, int64 (B, S); logits of the token after the last: (B, V), fp32."""
        begin, end = self.length, self.length + ids_BS.shape[1]
        cos_SR, sin_SR = (table[begin:end] for table in self._tables)
        decoder = self.model.model
        x_BSD = decoder.embed_tokens(ids_BS)
        for each, kept in zip(decoder.layers, self._kept, strict=True):
            layer = cast(DecoderLayer, each)
            normed_BSD = layer.input_layernorm(x_BSD)
            attended_BSD = self._attend(layer.self_attn, normed_BSD, cos_SR, sin_SR, kept)
            x_BSD, normed_BSD = layer.post_attention_layernorm(x_BSD, attended_BSD)
            x_BSD = x_BSD + layer.mlp(normed_BSD)
        self.length = end
        return self.model.lm_head(decoder.norm(x_BSD[:, -1:]))[:, 0].float()

    def _attend(
        self,
        attention: Attention,
        x_BSD: torch.Tensor,
        cos_SR: torch.Tensor,
        sin_SR: torch.Tensor,
        kept_2BKTH: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of the new tokens to all so far; their keys and values join what is kept."""
        heads, size = (-1, attention.head_dim), x_BSD.shape[1]
        q_BSNH = rotate(attention.q_proj(x_BSD).unflatten(-1, heads), cos_SR, sin_SR)
        k_BSKH = rotate(attention.k_proj(x_BSD).unflatten(-1, heads), cos_SR, sin_SR)
        v_BSKH = attention.v_proj(x_BSD).unflatten(-1, heads)
        end = self.length + size
        kept_2BKTH[0, :, :, self.length : end] = k_BSKH.transpose(1, 2)
        kept_2BKTH[1, :, :, self.length : end] = v_BSKH.transpose(1, 2)
        visible_ST = torch.ones(size, end, dtype=torch.bool, device=x_BSD.device)
        out_BNSH = F.scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            *kept_2BKTH[:, :, :, :end].unbind(),
            attn_mask=visible_ST.tril(self.length),
            enable_gqa=q_BSNH.shape[2] != k_BSKH.shape[2],
        )
        return attention.o_proj(out_BNSH.transpose(1, 2).flatten(-2))
