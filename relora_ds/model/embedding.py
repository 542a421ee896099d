"""The two ends of the model: token embedding and language-model head. Both are always full-rank.

Shape suffixes: B batch, S sequence, T tokens, D model, V vocab; `...` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.model.loss import VocabularySplit, linear_cross_entropy
from relora_ds.parallel.shape import TPShard, apply_shard, shard_of, tp_local_shape
from relora_ds.parallel.tensor import SINGLE, TensorParallel


class VocabularyPart(nn.Module):
    """A module with one `weight` (V, D), of which tensor parallelism leaves some rows here."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tp = tp

    def shard_over_ranks(self) -> None:
        """Leave this rank's rows of a filled weight; one that is tied is cut once."""
        if shard_of(self.weight) is None:
            rows = range(*self.tp.span(self.vocab_size))
            apply_shard(self.weight, TPShard(self.weight.shape, 0, rows))


class TokenEmbedding(VocabularyPart):
    """Looks up rows of `weight` (V, D), which is allocated, not drawn."""

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel = SINGLE) -> None:
        super().__init__(vocab_size, tp)
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, S) -> (B, S, D), or this rank's part of S."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        start, stop = self.tp.span(self.vocab_size)
        elsewhere = (ids < start) | (ids >= stop)
        found = F.embedding((ids - start).masked_fill(elsewhere, 0), self.weight)
        return self.tp.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))

    def extra_repr(self) -> str:
        return "{} -> {}".format(*tp_local_shape(self.weight))


class LanguageHead(VocabularyPart):
    """Hidden states to logits, or straight to the loss.

    The loss is computed inside this module, not by its caller: under ZeRO stage 3 a weight is whole
    only while its own module runs.

    Args:
        vocab_size: V.
        width: D.
        weight: shared with the embedding when the two are tied; otherwise allocated, not drawn.
        tp: processes that share the vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        weight: nn.Parameter | None = None,
        tp: TensorParallel = SINGLE,
    ) -> None:
        super().__init__(vocab_size, tp)
        if weight is None:
            weight = nn.Parameter(torch.empty(vocab_size, width))
        self.weight = weight

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, divisor: int = 1
    ) -> torch.Tensor:
        """Logits (..., V) in the working dtype without `targets`, a scalar fp32 loss with them.

        Args:
            hidden: (..., D), or this rank's part of the sequence.
            targets: int64 (...), `loss.IGNORE` where a token does not count.
            divisor: the summed loss is divided by it.
        """
        hidden = self.tp.enter(hidden)
        if targets is None:
            return self._whole_logits(F.linear(hidden, self.weight))
        rows = hidden.flatten(0, -2)
        return linear_cross_entropy(
            rows, self.weight, targets.flatten(), divisor, vocabulary=self._split()
        )

    def _split(self) -> VocabularySplit | None:
        if self.tp.size == 1:
            return None
        return VocabularySplit(self.tp, *self.tp.span(self.vocab_size))

    def _whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary, the same on every rank; for evaluation only."""
        if self.tp.size == 1:
            return logits
        whole = logits.new_zeros(*logits.shape[:-1], self.vocab_size)
        whole[..., slice(*self.tp.span(self.vocab_size))] = logits.detach()
        return self.tp.sum(whole)  # every element is on one rank: exact

    def extra_repr(self) -> str:
        return "{1} -> {0}".format(*tp_local_shape(self.weight))
