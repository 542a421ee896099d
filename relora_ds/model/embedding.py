"""The two ends of the model: token embedding and language-model head. Both are always full-rank.

Shape suffixes: B batch, S sequence, T tokens, D model, V vocab; `...` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.model.loss import linear_cross_entropy
from relora_ds.parallel.shape import whole_shape


class TokenEmbedding(nn.Module):
    """Looks up rows of `weight` (V, D), which is allocated, not drawn."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (...) -> (..., D)."""
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return "{} -> {}".format(*whole_shape(self.weight))


class LanguageHead(nn.Module):
    """Hidden states to logits, or straight to the loss.

    The loss is computed inside this module, not by its caller: under ZeRO stage 3 a weight is whole
    only while its own module runs.

    Args:
        vocab_size: V.
        width: D.
        weight: shared with the embedding when the two are tied; otherwise allocated, not drawn.
    """

    def __init__(self, vocab_size: int, width: int, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        if weight is None:
            weight = nn.Parameter(torch.empty(vocab_size, width))
        self.weight = weight

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, divisor: int = 1
    ) -> torch.Tensor:
        """Logits (..., V) in the working dtype without `targets`, a scalar fp32 loss with them.

        Args:
            hidden: (..., D).
            targets: int64 (...), `loss.IGNORE` where a token does not count.
            divisor: the summed loss is divided by it.
        """
        if targets is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten(), divisor)

    def extra_repr(self) -> str:
        return "{1} -> {0}".format(*whole_shape(self.weight))
