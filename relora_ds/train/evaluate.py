"""Validation loss: the token-weighted mean over every target, whatever the topology."""

from __future__ import annotations

import math

import torch

from relora_ds.activity import moved
from relora_ds.data.batches import ValidationBatches
from relora_ds.engine.distributed import sum_over_ranks
from relora_ds.model.llama import Llama
from relora_ds.numerics.transfers import upload


@torch.no_grad()
def validation_loss(
    model: Llama, batches: ValidationBatches, device: torch.device, distributed: bool = True
) -> tuple[float, int]:
    """Mean loss in nats and the number of targets it is a mean of.

    Args:
        model: left in the mode it was in.
        batches: this rank's share; every rank has equally many.
        distributed: sum over all ranks.
    """
    was_training = model.training
    model.eval()
    # fp64: the sum over millions of targets, and the count beside it in the same reduction
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens, row_mask in batches:
        moved()
        loss, count = model.token_losses_sum(upload(tokens, device), upload(row_mask, device))
        totals[0] += loss
        totals[1] += count
    model.train(was_training)
    if distributed:
        sum_over_ranks(totals)
    loss, count = totals.tolist()
    return loss / count, int(count)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf
