"""Validation loss: the token-weighted mean over every target, or what published tables average."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from relora_ds.activity import moved
from relora_ds.config.schema import RunConfig
from relora_ds.data.batches import DocumentBatches, ValidationBatches
from relora_ds.data.source import Corpus
from relora_ds.engine.distributed import sum_over_ranks
from relora_ds.errors import DataError
from relora_ds.model.llama import Llama
from relora_ds.numerics.transfers import upload


def validation_batches(
    config: RunConfig, corpus: Corpus, dp_rank: int = 0, dp_size: int = 1
) -> ValidationBatches | DocumentBatches | None:
    """One process's share of what every evaluation of a run reads; None where it has no such data.

    Args:
        config: the run.
        corpus: its data.
        dp_rank: the process among those that hold copies of the model.
        dp_size: how many these are.

    Raises:
        DataError: the set is shorter than one window, or nothing in it is predicted.
    """
    samples, train, batches = corpus.validation, config.train, config.eval.batches
    if samples is None:
        return None
    limit = None if batches is None else batches * train.global_batch_size
    place = train.seq_length, train.micro_batch_size, dp_rank, dp_size, limit
    if config.eval.protocol == "exact":
        found = ValidationBatches(samples, *place)
    else:
        assert corpus.valid is not None, "a rule asks for a file of its own"
        found = DocumentBatches(corpus.valid, *place, multiple=config.parallel.sequence_parts)
    check_targets(found.has_targets(corpus.document_end))
    return found


@torch.no_grad()
def validation_loss(
    model: Llama, batches: ValidationBatches, device: torch.device, distributed: bool = True
) -> tuple[float, int]:
    """Mean loss in nats and the number of targets it is a mean of.

    Args:
        model: left in the mode it was in.
        batches: this rank's share; every rank has equally many.
        distributed: sum over all ranks.

    Raises:
        DataError: there is none.
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
    check_targets(count)
    return loss / count, int(count)


@dataclass(frozen=True)
class PublishedScore:
    """What the protocol of GaLore's published tables makes of a validation set."""

    loss: float
    """Sum of the means of micro-batches over one more than there are, the mean over ranks: the
    figure that tables are made of."""
    token_loss: float
    """Mean over every target of the same rows."""
    tokens: int
    """Targets, over all ranks."""
    batches: int
    """Micro-batches, over all ranks."""


@torch.no_grad()
def published_score(
    model: Llama, batches: DocumentBatches, device: torch.device, distributed: bool = True
) -> PublishedScore:
    """Evaluate as `torchrun_main.py` of GaLore, SLTrain and their successors does, in fp32.

    Their counter of batches begins with one, so that the sum is divided by one too many.

    Args:
        model: left in the mode it was in.
        batches: this rank's share; every rank has equally many.
        distributed: the mean over all ranks.
    """
    was_training = model.training
    model.eval()
    means, count, loss, targets = torch.zeros(4, dtype=torch.float64, device=device)
    for tokens, mask in batches:
        moved()
        total, number = model.token_losses_sum(upload(tokens, device), upload(mask, device))
        means += total / number.clamp_min(1)
        count += number > 0
        loss += total
        targets += number
    model.train(was_training)
    found = torch.stack([means / (count + 1), torch.ones_like(count), loss, targets, count])
    if distributed:
        sum_over_ranks(found)
    published, ranks, loss, targets, count = found.tolist()
    token_loss = loss / targets if targets else math.nan
    return PublishedScore(published / ranks, token_loss, int(targets), int(count))


def check_targets(count: float) -> None:
    """Make sure that an evaluation has predicted something.

    Raises:
        DataError: it has no target, of whose losses there could be a mean.
    """
    if not count:
        raise DataError(
            "no token that the evaluation reads is a target: its documents hold nothing but the "
            "token that ends them; take more of the set (eval.batches), or another one"
        )


def evaluation_metrics(
    model: Llama, batches: ValidationBatches | DocumentBatches, device: torch.device
) -> dict[str, float]:
    """Figures of an evaluation during training, by metric name. A collective call.

    Raises:
        DataError: nothing in it is predicted.
    """
    if isinstance(batches, ValidationBatches):
        loss, _ = validation_loss(model, batches, device)
        return {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
    score = published_score(model, batches, device)
    check_targets(score.tokens)
    return {
        "eval/loss": score.loss,
        "eval/perplexity": perplexity(score.loss),
        "eval/token_loss": score.token_loss,
        "eval/token_perplexity": perplexity(score.token_loss),
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf
