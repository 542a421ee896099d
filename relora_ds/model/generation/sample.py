"""Which token comes next, and when a text ends.

A choice is a pure function of the seed, the number of the text and the place in it: equal arguments
give equal texts, whatever else is generated beside them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from relora_ds.errors import CheckpointError, ConfigError
from relora_ds.model.generation.cache import CachedModel
from relora_ds.model.llama import Llama
from relora_ds.randomness import Stream


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_tokens: int = 100
    """Tokens generated at most."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens are drawn from, as few as have this probability together."""
    seed: int = 0
    """Of the choices."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max-tokens is {self.max_tokens}: write 1 or more")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature:g}: write 0 or more, 0.8 is usual")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"top-p is {self.top_p:g}: write a probability above 0 and at most 1, 0.95 is usual"
            )


def generate(
    model: Llama,
    prompt: list[int],
    sampling: Sampling,
    ends: Collection[int] = (),
    text: int = 0,
    cached: bool = True,
    known: int | None = None,
) -> list[int]:
    """Tokens that follow a prompt, without those that end a text.

    Args:
        model: whole on this process; what it computes in is what it was built in.
        prompt: at least one token.
        sampling: how many tokens, and how they are chosen.
        ends: tokens that end the text.
        text: number of the text, so that equal prompts may go on differently.
        cached: keep keys and values; otherwise everything is computed again for every token.
        known: ids from here on stand for no token, as where a vocabulary is padded, and are never
            chosen; None where all of the model's do.

    Raises:
        ConfigError: prompt and text are longer than the model's context, or the prompt is empty.
        CheckpointError: the model does not compute numbers.
    """
    limit = model.config.max_position_embeddings
    total = len(prompt) + sampling.max_tokens
    if not prompt or total > limit:
        raise ConfigError(
            f"{len(prompt)} tokens of the prompt and {sampling.max_tokens} to generate: the model "
            f"takes 1 to {limit} tokens in all; shorten the prompt, or generate fewer"
        )
    device = model.lm_head.weight.device
    stream = Stream(sampling.seed, "generate", "text", text)
    reader = CachedModel(model, 1, total)
    unread, found = list(prompt), list[int]()
    while len(found) < sampling.max_tokens:
        if not cached:
            unread, reader = [*prompt, *found], CachedModel(model, 1, total)
        logits = reader.read(torch.tensor([unread], device=device))[0, :known]
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(
                "the model's logits are not finite: it diverged before it was saved, or its file "
                "is damaged; use an earlier checkpoint"
            )
        token = choose(logits, sampling, stream, len(found))
        if token in ends:
            break
        found.append(token)
        unread = [token]
    return found


def choose(logits: torch.Tensor, sampling: Sampling, stream: Stream, place: int) -> int:
    """The token that comes next.

    Args:
        logits: fp32 (V,).
        sampling: temperature and top-p.
        stream: of the text.
        place: of the token in it; which number of the stream decides.
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    # on the host and in fp64, so that every device chooses alike from equal logits
    exact = logits.double().cpu()
    scaled = (exact - exact.max()) / sampling.temperature  # the largest is 0: none overflows
    chances, order = scaled.softmax(-1).sort(descending=True, stable=True)
    before = chances.cumsum(-1) - chances
    kept = chances.masked_fill(before >= sampling.top_p, 0.0)  # the likeliest always stays
    reached = kept.cumsum(-1)
    draw = float(stream.uniform(place, 1)) * float(reached[-1])
    return int(order[int(torch.searchsorted(reached, draw, right=True).clamp(max=len(order) - 1))])
