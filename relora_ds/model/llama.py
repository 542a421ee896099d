"""The LLaMA decoder: names, shapes and mathematics of Hugging Face's `LlamaForCausalLM`.

Every projection is built by a factory, so what a projection is (dense, adapted, cut over processes)
is decided when the model is built and nothing in this file changes.

Shape suffixes: B batch, S sequence, D model, V vocab, R half a head.
"""

# ruff: noqa: N803, N806 - capital suffixes are tensor shapes
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from relora_ds.config.model import ModelConfig
from relora_ds.model.attention import Attention
from relora_ds.model.documents import Documents
from relora_ds.model.embedding import LanguageHead, TokenEmbedding
from relora_ds.model.loss import IGNORE
from relora_ds.model.mlp import MLP
from relora_ds.model.norm import AddAndNorm, RMSNorm
from relora_ds.model.rope import rotary_tables
from relora_ds.parallel.linear import LinearFactory, Projection
from relora_ds.parallel.tensor import SINGLE, TensorParallel


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        linear: LinearFactory,
        name: str,
        attention: str,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        # in the order of HF's parameters
        self.self_attn = Attention(config, linear, f"{name}.self_attn", attention, tp)
        self.mlp = MLP(config, linear, f"{name}.mlp", tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.post_attention_layernorm = AddAndNorm(config.hidden_size, config.rms_norm_eps, tp)

    def forward(
        self,
        x_BSD: torch.Tensor,
        cos_SR: torch.Tensor,
        sin_SR: torch.Tensor,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        attended_BSD = self.self_attn(self.input_layernorm(x_BSD), cos_SR, sin_SR, documents)
        x_BSD, normed_BSD = self.post_attention_layernorm(x_BSD, attended_BSD)
        return x_BSD + self.mlp(normed_BSD)


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(
        self,
        config: ModelConfig,
        linear: LinearFactory,
        attention: str,
        activation_checkpointing: bool,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.document_end: int | None = None
        """Id at which attention and positions end; None: they go on to the end of the sequence."""
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(
            DecoderLayer(config, linear, f"model.layers.{i}", attention, tp)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        if activation_checkpointing:
            for module in self.modules():
                if isinstance(module, Projection):
                    module.recomputed = True

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """int64 (B, S) -> (B, S, D)."""
        config = self.config
        x_BSD = self.embed_tokens(ids_BS)
        cos_SR, sin_SR = rotary_tables(
            config.head_dim,
            config.rope_theta,
            ids_BS.shape[1],
            x_BSD.device,
            config.rope_scaling,
        )
        what: tuple[Any, ...] = cos_SR, sin_SR
        if self.document_end is not None:
            documents = Documents(ids_BS, self.document_end)
            what = cos_SR[documents.positions], sin_SR[documents.positions], documents
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                # Nothing in a layer draws from a global generator; saving its state would copy it
                # from the device and wait for it, once per layer.
                x_BSD = checkpoint(
                    layer, x_BSD, *what, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BSD = layer(x_BSD, *what)
        return self.norm(x_BSD)


class Llama(nn.Module):
    """Decoder and head. Parameters are allocated, not drawn: `InitialWeights` has their values.

    Parameter names and shapes are Hugging Face's. With `tie_word_embeddings` the head's weight *is*
    the embedding's, and `named_parameters` lists it once, as ``model.embed_tokens.weight``.

    Args:
        config: architecture.
        linear: builds each of the seven projections of every layer.
        attention: a value of `train.attention`.
        activation_checkpointing: recompute each layer in the backward pass of training.
        tp: processes that share this copy of the model.

    Raises:
        ConfigError: `attention` is unknown or cannot run here.
    """

    def __init__(
        self,
        config: ModelConfig,
        linear: LinearFactory,
        attention: str = "auto",
        activation_checkpointing: bool = False,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, linear, attention, activation_checkpointing, tp)
        shared = self.model.embed_tokens.weight if config.tie_word_embeddings else None
        self.lm_head = LanguageHead(config.vocab_size, config.hidden_size, shared, tp)

    def forward(
        self,
        tokens: torch.Tensor,
        row_mask: torch.Tensor | None = None,
        mean: bool = True,
        logits: bool = False,
    ) -> torch.Tensor:
        """Cross-entropy of every token given those before it: a scalar, fp32, in nats.

        Where documents are kept apart, the first token of a document is no target, as in a sequence
        of its own.

        Args:
            tokens: int64 (B, S + 1); the first S are read, the last S are predicted.
            row_mask: bool (B,), False for rows that contribute nothing, or (B, S), False for
                targets that do; default all True.
            mean: divide by B * S (what is masked out counts in it, and so do first tokens), so that
                every target weighs the same in every batch; otherwise return the sum.
            logits: read all tokens and return (B, S + 1, V) in the working dtype instead.
        """
        if logits:
            return self.lm_head(self.model(tokens))
        targets_BS = self._targets(tokens, row_mask)
        hidden_BSD = self.model(tokens[:, :-1])
        return self.lm_head(hidden_BSD, targets_BS, targets_BS.numel() if mean else 1)

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, S) -> (B, S, V) in the working dtype."""
        # through __call__, so that hooks on the root module run as they do in training
        return self(input_ids, logits=True)

    @torch.no_grad()
    def token_losses_sum(
        self, tokens: torch.Tensor, row_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and number of targets, for a token-weighted mean over many batches.

        Args:
            tokens: int64 (B, S + 1).
            row_mask: bool (B,), False for padding rows, or (B, S), False for targets that are
                padding; default all True.

        Returns:
            The sum (fp64 scalar, of losses that were added up in fp32) and the count (int64
            scalar), both on the tokens' device.
        """
        total = self(tokens, row_mask, mean=False)
        return total.double(), (self._targets(tokens, row_mask) != IGNORE).sum()

    def separate_documents(self, end: int | None) -> None:
        """Let attention and positions end at this id from now on, and train on no token behind it;
        None takes that back."""
        self.model.document_end = end

    def compile_layers(self) -> None:
        """Have torch's compiler make what training computes between products from now on."""
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention | MLP):
                module.compiled = True

    def _targets(self, tokens: torch.Tensor, row_mask: torch.Tensor | None) -> torch.Tensor:
        """What is predicted at each position, `IGNORE` where nothing is: int64 (B, S)."""
        targets_BS = tokens[:, 1:]
        if row_mask is not None:
            mask = row_mask if row_mask.dim() == 2 else row_mask.unsqueeze(1)
            targets_BS = targets_BS.masked_fill(~mask, IGNORE)
        end = self.model.document_end
        return targets_BS if end is None else targets_BS.masked_fill(tokens[:, :-1] == end, IGNORE)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Llama:
        # Moving off the meta device replaces every Parameter object, and a tie with it.
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self


def partial_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a tensor-parallel group holds alike and of whose gradients each rank finds a
    share of a sum."""
    modules = (m for m in model.modules() if isinstance(m, Projection | RMSNorm))
    return [parameter for module in modules for parameter in module.partial_gradients()]
