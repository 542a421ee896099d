"""A saved model with a head that reads the last token: transformers' classifier, peft's factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from relora_ds.checkpoint.export.peft import export_peft
from relora_ds.data.tokenizer import AnyTokenizer
from relora_ds.extras import require
from relora_ds.model.hf.directory import ADAPTER, BASE
from relora_ds.train.saved_model.directory import as_directory
from relora_ds.train.saved_model.glue.examples import Example
from relora_ds.train.saved_model.glue.tasks import Task

Trained = Literal["full", "lora", "adapters"]
"""What is fine-tuned beside the head: every weight; new factors of low rank; or the factors of an
un-merged checkpoint, on its frozen base."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Source:
    """Files that classifiers are made of, one for each seed."""

    model: Path
    """A Hugging Face directory."""
    adapter: Path | None
    """Directory of the factors on it that are trained further."""


@contextmanager
def opened(path: Path, trained: Trained) -> Iterator[Source]:
    """What classifiers are made of, which exists while the block runs.

    Args:
        path: a checkpoint; a Hugging Face directory too, unless its factors are to be trained.
        trained: what will be.

    Raises:
        CheckpointError: the model cannot be read, or has no dense weights or no factors.
    """
    if trained != "adapters":
        with as_directory(path) as model:
            yield Source(model, None)
        return
    with TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        export_peft(path, adapter, torch.float32)
        yield Source(adapter / BASE, adapter)


def classifier(
    source: Source, task: Task, trained: Trained, rank: int, alpha: float, seed: int
) -> Any:
    """A model whose output is one number per class, or the similarity; on the CPU, in fp32.

    Args:
        source: what it is made of.
        task: says how many classes there are.
        trained: only these weights, and the head's, take gradients.
        rank: of new factors.
        alpha: their product counts alpha / rank.
        seed: of the head and of new factors.

    Raises:
        ConfigError: transformers or peft is not installed.
    """
    transformers = require("transformers", "transformers", "fine-tuning")
    transformers.logging.set_verbosity_error()  # it warns that the head is new
    transformers.logging.disable_progress_bar()
    names = dict(enumerate(task.labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            source.model,
            dtype=torch.float32,
            num_labels=len(task.labels) or 1,
            problem_type="regression" if task.is_regression else "single_label_classification",
            **({"id2label": names, "label2id": {v: k for k, v in names.items()}} if names else {}),
        )
        return model if trained == "full" else _with_factors(model, source, rank, alpha)


def _with_factors(model: Any, source: Source, rank: int, alpha: float) -> Any:
    peft = require("peft", "peft", "--train lora and --train adapters")
    if source.adapter is None:
        chosen = {"r": rank, "lora_alpha": alpha, "target_modules": list(_PROJECTIONS)}
    else:
        saved = peft.LoraConfig.from_pretrained(source.adapter)
        chosen = {key: getattr(saved, key) for key in ("r", "lora_alpha", "target_modules")}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **chosen))
    if source.adapter is not None:
        fresh = peft.get_peft_model_state_dict(adapted)  # with the head, which the files lack
        peft.set_peft_model_state_dict(adapted, fresh | load_file(source.adapter / ADAPTER))
    return adapted


class Encoding:
    """Sentences as ids. Each ends with the id that ended documents in training, whose state the
    head reads.

    Args:
        tokenizer: the model's.
        length: ids of an example at most; of longer pairs the longer sentence is cut first.
        pad: id that the tokenizer fills rows with, if it has one.
    """

    def __init__(self, tokenizer: AnyTokenizer, length: int, pad: int | None) -> None:
        self._tokenizer, self._length = tokenizer, length
        end = tokenizer.eos_id
        self.padding = pad if pad not in (None, end) else int(end == 0)
        """That of the tokenizer, or where it ends sentences too, any other id: rows are masked, and
        the head looks for the last id that is not this one."""

    def encode(self, examples: Sequence[Example]) -> list[list[int]]:
        """Ids of each example."""
        columns = zip(*(example.texts for example in examples), strict=True)
        parts = [self._tokenizer.encode_batch(texts) for texts in columns]
        return [self._joined(each) for each in zip(*parts, strict=True)]

    def _joined(self, parts: Sequence[list[int]]) -> list[int]:
        room = self._length - len(parts)
        if len(parts) == 1:
            kept = [room]
        else:
            first, second = map(len, parts)
            half = room // 2
            kept = [max(room - second, room - half), max(room - first, half)]
        end = self._tokenizer.eos_id
        return [i for part, n in zip(parts, kept, strict=True) for i in (*part[:n], end)]

    def batch(self, rows: Sequence[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
        """Arguments of the model: ids and mask, shape (rows, longest row)."""
        width = max(map(len, rows))
        ids = [[*row, *[self.padding] * (width - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }
