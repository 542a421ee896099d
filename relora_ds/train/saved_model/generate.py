"""Text from a saved model, in one process and in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.checkpoint.export.hf import described
from relora_ds.config.model import ModelConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.engine.accelerator import check_accelerator
from relora_ds.engine.deepspeed.process_group import accelerator_type
from relora_ds.engine.device import set_arithmetic
from relora_ds.errors import ConfigError
from relora_ds.model.generation.sample import Sampling, generate
from relora_ds.train.saved_model.directory import tokenizer_of


@dataclass(frozen=True)
class Generated:
    """A prompt and what follows it."""

    prompt: str
    text: str
    """Without the prompt."""
    tokens: int
    """That were generated."""
    ended: bool
    """Whether the model ended the text, as against its greatest length."""


def generate_from_checkpoint(
    checkpoint: Path, prompts: Sequence[str], sampling: Sampling, cached: bool = True
) -> list[Generated]:
    """Go on with each of some texts.

    Args:
        checkpoint: a checkpoint of ours, or a Hugging Face directory.
        prompts: beginnings of texts. An empty one stands for the token that ends a text, which is
            what comes before a text in training.
        sampling: how many tokens, and how they are chosen.
        cached: keep keys and values of earlier tokens.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its model does not compute numbers.
        ConfigError: it has no tokenizer, or a prompt is too long or no text.
        DataError: the tokenizer cannot be read, or is not that of the model.
    """
    dense = DenseModel(checkpoint)
    tokenizer = tokenizer_of(dense)
    _, architecture = described(dense, with_tokenizer=True)
    ends = _ends(architecture)
    length = architecture.max_position_embeddings
    train = TrainConfig(steps=1, seq_length=length, micro_batch_size=1, global_batch_size=1)
    check_accelerator()
    set_arithmetic(train)
    model = dense.model(train, torch.device(accelerator_type())).eval()
    found = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode(_text(prompt)) or [tokenizer.eos_id]
        room = min(sampling.max_tokens, max(1, length - len(ids)))
        shorter = replace(sampling, max_tokens=room)
        tokens = generate(model, ids, shorter, ends, number, cached, tokenizer.vocab_size)
        text = tokenizer.decode([*ids, *tokens]).removeprefix(tokenizer.decode(ids))
        found.append(Generated(prompt, text, len(tokens), len(tokens) < room))
    return found


def _text(prompt: str) -> str:
    """The prompt, if it is one.

    Raises:
        ConfigError: it holds bytes of a command line or of an input that are no text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is no UTF-8 at its character {error.start + 1}: convert it, or set LANG "
            "to the encoding that it is written in"
        ) from error
    return prompt


def _ends(architecture: ModelConfig) -> tuple[int, ...]:
    """Ids that end a text."""
    ends = architecture.eos_token_id
    return ends if isinstance(ends, tuple) else () if ends is None else (ends,)
