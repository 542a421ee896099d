"""Scoring a saved model on a token file, in one process and in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.config.sections import DataConfig, TrainConfig
from relora_ds.data.batches import DocumentBatches, ValidationBatches
from relora_ds.data.source import Corpus, open_corpus, with_documents
from relora_ds.data.token_files.samples import Samples
from relora_ds.data.token_files.split import hold_out
from relora_ds.data.tokens import TokenFile
from relora_ds.engine.accelerator import check_accelerator
from relora_ds.engine.deepspeed.process_group import accelerator_type
from relora_ds.engine.device import set_arithmetic
from relora_ds.errors import ConfigError
from relora_ds.model.llama import Llama
from relora_ds.train.evaluate import check_targets, perplexity, published_score, validation_loss

_DEFAULT_SEQ_LENGTH = 2048


def evaluate_checkpoint(
    checkpoint: Path,
    data: str,
    seq_length: int | None,
    batch_size: int,
    published_ranks: int | None = None,
    document_mask: bool | None = None,
    valid_share: float | None = None,
) -> dict[str, Any]:
    """A model's score on one token file; see `evaluate_sets`."""
    how = seq_length, batch_size, published_ranks, document_mask, valid_share
    return evaluate_sets(checkpoint, [data], *how)[0]


def evaluate_sets(
    checkpoint: Path,
    sets: Sequence[str],
    seq_length: int | None,
    batch_size: int,
    published_ranks: int | None = None,
    document_mask: bool | None = None,
    valid_share: float | None = None,
) -> list[dict[str, Any]]:
    """Token-weighted mean loss over non-overlapping windows of each of some token files.

    All files are opened before the model is.

    Args:
        checkpoint: a checkpoint of ours or a Hugging Face directory.
        sets: token file prefixes, or `builtin` for the builtin validation set whose vocabulary is
            the model's.
        seq_length: tokens per window; default: that of the run, or the model's longest up to 2048.
        batch_size: windows per forward pass.
        published_ranks: evaluate by the protocol of GaLore's published tables in place of that,
            with rows of `seq_length` dealt out to so many processes.
        document_mask: whether documents in a window are kept apart; default: as in the run.
        valid_share: score only what `data.valid_share` of this value holds out of each file.

    Returns:
        Of every set `loss` in nats, `perplexity`, and `tokens`, the number of targets. By the
        published protocol also its name, the micro-batches, and the mean over the tokens of the
        same rows.

    Raises:
        ConfigError: the windows are longer than the model allows, or this machine has GPUs that
            torch cannot use.
        CheckpointError: the checkpoint cannot be read.
        DataError: the token file cannot be used with the model, or another tokenizer made it.
    """
    dense = DenseModel(checkpoint)
    seq_length = _length(dense, seq_length, batch_size, published_ranks)
    corpora = [_open(data, dense) for data in sets]
    ends = [_document_end(corpus, dense, document_mask) for corpus in corpora]
    train = TrainConfig(
        steps=1, seq_length=seq_length, micro_batch_size=batch_size, global_batch_size=batch_size
    )
    check_accelerator()
    set_arithmetic(train)
    device = torch.device(accelerator_type())
    model = dense.model(train, device)
    sizes, found = (seq_length, batch_size), list[dict[str, Any]]()
    for corpus, end in zip(corpora, ends, strict=True):
        model.separate_documents(end)
        assert corpus.valid is not None
        if published_ranks is None:
            samples = (
                corpus.valid if valid_share is None else hold_out(corpus.valid, valid_share)[1]
            )
            found.append(_exact(model, samples, sizes, device))
        else:
            found.append(_published(model, corpus.valid, sizes, published_ranks, device))
    return found


def _length(dense: DenseModel, wanted: int | None, batch_size: int, ranks: int | None) -> int:
    """Tokens per window.

    Raises:
        ConfigError: the model, or the protocol, does not take windows or batches of this size.
    """
    limit = dense.architecture.max_position_embeddings
    seq_length = wanted or dense.seq_length or min(limit, _DEFAULT_SEQ_LENGTH)
    shortest = 1 if ranks is None else 2
    if not shortest <= seq_length <= limit or batch_size < 1:
        raise ConfigError(
            f"seq-length {seq_length} and batch-size {batch_size}: the model takes {shortest} to "
            f"{limit} tokens, and a batch at least one sequence"
        )
    if ranks is not None and ranks < 1:
        raise ConfigError(f"ranks {ranks}: rows are dealt out to 1 or more")
    return seq_length


def _exact(
    model: Llama, samples: Samples, sizes: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    batches = ValidationBatches(samples, *sizes, dp_rank=0, dp_size=1)
    loss, tokens = validation_loss(model, batches, device, distributed=False)
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": tokens}


def _document_end(corpus: Corpus, model: DenseModel, wanted: bool | None) -> int | None:
    """Id with which attention ends; None where documents are not kept apart."""
    if wanted is None:
        wanted = model.saved is not None and model.saved.record.config.data.document_mask
    if not wanted:
        return None
    named = replace(corpus, tokenizer=corpus.tokenizer or model.tokenizer)
    return with_documents(named).document_end


def _published(
    model: Llama, file: TokenFile, sizes: tuple[int, int], ranks: int, device: torch.device
) -> dict[str, Any]:
    scores = [
        published_score(model, DocumentBatches(file, *sizes, rank, ranks), device, False)
        for rank in range(min(ranks, file.num_documents))
    ]
    loss = sum(score.loss for score in scores) / ranks
    tokens = sum(score.tokens for score in scores)
    check_targets(tokens)
    token_loss = sum(score.token_loss * score.tokens for score in scores if score.tokens) / tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "tokens": tokens,
        "protocol": "galore_compat",
        "batches": sum(score.batches for score in scores),
        "token_loss": token_loss,
        "token_perplexity": perplexity(token_loss),
    }


def _open(data: str, model: DenseModel) -> Corpus:
    """A token file as validation set, of which every id is one of the model's, and means the same
    there."""
    vocab_size = model.architecture.vocab_size
    if data == "builtin":
        corpus = open_corpus(DataConfig(source="builtin", builtin_vocab_size=vocab_size))
        assert corpus.valid is not None
        corpus = replace(corpus, train=(), weights=())
    else:
        corpus = Corpus((), (), TokenFile(data), None)
        corpus.check_vocabulary(vocab_size)
    corpus.check_tokenizer_of(model.directory)
    return corpus
