"""Fine-tuning on a task of GLUE with several seeds, in one process and in fp32."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relora_ds.checkpoint.export.dense import DenseModel
from relora_ds.config.sections import TrainConfig
from relora_ds.data.tokenizer import special_ids
from relora_ds.engine.accelerator import check_accelerator
from relora_ds.engine.deepspeed.process_group import accelerator_type
from relora_ds.engine.device import set_arithmetic
from relora_ds.errors import DivergenceError
from relora_ds.extras import require
from relora_ds.model.hf.directory import check_target, new_export
from relora_ds.model.hf.tokenizer import write_tokenizer
from relora_ds.train.saved_model.directory import tokenizer_of
from relora_ds.train.saved_model.glue.classifier import (
    Encoding,
    Source,
    Trained,
    classifier,
    opened,
)
from relora_ds.train.saved_model.glue.examples import Example, Examples
from relora_ds.train.saved_model.glue.metrics import METRICS
from relora_ds.train.saved_model.glue.tasks import Task
from relora_ds.train.saved_model.notes import note_in_summary

KEY = "glue"
"""Of `summary.json`."""
RATES = {"full": 3e-5, "lora": 5e-4, "adapters": 5e-4}
"""Learning rate by what is trained: that of the full fine-tuning in SwitchLoRA's README, and that
of LoRA's paper (arXiv 2106.09685) for RoBERTa base."""


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned; the defaults are those of SwitchLoRA's `run_glue_full.sh`.

    There AdamW without decay follows a rate that falls linearly from the first update on, over 30
    epochs of batches of 16, with gradients clipped to a norm of 1, once for each of five seeds.
    """

    trained: Trained = "full"
    lr: float | None = None
    """None for that of `RATES`."""
    epochs: int = 30
    batch_size: int = 16
    max_length: int = 512
    """Ids of an example; less where the model reads no more."""
    warmup_share: float = 0.0
    """Of all updates."""
    weight_decay: float = 0.0
    clip: float = 1.0
    rank: int = 8
    """Of new factors; with `alpha` that of LoRA's paper for RoBERTa base, but in every projection,
    as SwitchLoRA's code has them."""
    alpha: float = 8.0
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Of the head, new factors and the order of the examples."""

    @property
    def peak(self) -> float:
        """Learning rate after the warm-up."""
        return RATES[self.trained] if self.lr is None else self.lr


def fine_tune(
    path: Path, task: Task, examples: Examples, settings: Settings, output: Path | None = None
) -> dict[str, Any]:
    """Fine-tune a model once per seed, and score it after the last epoch.

    The scores also go into the `summary.json` of the run that the model lies in.

    Args:
        path: a Hugging Face directory, or a checkpoint.
        task: what the model learns.
        examples: of the task.
        settings: how.
        output: folder that gets a model for each seed, `seed_N`; None to keep none.

    Returns:
        JSON values: mean, standard deviation and values of each metric, and the settings.

    Raises:
        ConfigError: a package is missing, the model has no tokenizer, or `output` is taken.
        CheckpointError: the model cannot be read.
        DivergenceError: a loss is not finite.
    """
    check_accelerator()
    set_arithmetic(TrainConfig(steps=1, seq_length=1, micro_batch_size=1, global_batch_size=1))
    for seed in settings.seeds if output else ():
        check_target(_place(output, seed))
    saved = DenseModel(path)
    length = min(settings.max_length, saved.architecture.max_position_embeddings)
    tokenizer = tokenizer_of(saved)
    encoding = Encoding(tokenizer, length, special_ids(tokenizer.path).pad)
    scores: dict[str, list[float]] = {}
    with opened(path, settings.trained) as source:
        for seed in settings.seeds:
            run = _FineTuning(source, task, examples, encoding, settings, seed)
            for name, value in run.train().items():
                scores.setdefault(name, []).append(value)
            if output is not None:
                with new_export(_place(output, seed)) as work:
                    run.model.save_pretrained(work)
                    write_tokenizer(tokenizer.path, work)
    result = {
        "task": task.name,
        **{name: _over_seeds(values) for name, values in scores.items()},
        "examples": {"train": len(examples.train), "skipped": examples.skipped},
        "settings": {**asdict(settings), "lr": settings.peak, "max_length": length},
    }
    note_in_summary(path, KEY, {f"{task.name}/{settings.trained}": result})
    return result


def _place(output: Path | None, seed: int) -> Path:
    return (output or Path()) / f"seed_{seed}"


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": list(values)}


class _FineTuning:
    """One seed's model, on its way.

    Args:
        source: what the model is made of.
        task: what it learns.
        examples: of the task.
        encoding: of their sentences.
        settings: how.
        seed: of the head, new factors and the order of the examples.
    """

    def __init__(
        self,
        source: Source,
        task: Task,
        examples: Examples,
        encoding: Encoding,
        settings: Settings,
        seed: int,
    ) -> None:
        self._task, self._encoding, self._settings, self._seed = task, encoding, settings, seed
        self._device = torch.device(accelerator_type())
        self.model = classifier(
            source, task, settings.trained, settings.rank, settings.alpha, seed
        ).to(self._device)
        self.model.config.pad_token_id = encoding.padding
        self._train = encoding.encode(examples.train), _labels(examples.train)
        self._validation = {
            suffix: (encoding.encode(each), _labels(each))
            for suffix, each in examples.validation.items()
        }

    def train(self) -> dict[str, float]:
        """Train over all epochs; the metrics after the last."""
        settings, rows = self._settings, self._train[0]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.peak, weight_decay=settings.weight_decay)
        updates = settings.epochs * -(-len(rows) // settings.batch_size)
        schedule = require(
            "transformers", "transformers", "fine-tuning"
        ).get_linear_schedule_with_warmup(
            optimizer, round(settings.warmup_share * updates), updates
        )
        order = torch.Generator().manual_seed(self._seed)
        scores: dict[str, float] = {}
        for epoch in range(1, settings.epochs + 1):
            begun, losses = time.monotonic(), []
            self.model.train()
            for chosen in torch.randperm(len(rows), generator=order).split(settings.batch_size):
                loss = self._loss(chosen.tolist())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, settings.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
            mean = float(torch.stack(losses).mean())
            self._check(mean, epoch)
            scores = self._scores()
            self._tell(epoch, mean, scores, time.monotonic() - begun)
        return scores

    def _loss(self, chosen: list[int]) -> torch.Tensor:
        rows, labels = self._train
        kind = torch.float32 if self._task.is_regression else torch.long
        expected = torch.tensor(labels[chosen], dtype=kind, device=self._device)
        batch = self._encoding.batch([rows[i] for i in chosen], self._device)
        return self.model(**batch, labels=expected).loss

    def _check(self, loss: float, epoch: int) -> None:
        if not np.isfinite(loss):
            raise DivergenceError(
                f"{self._task.name}, seed {self._seed}, epoch {epoch}: the loss is {loss}, but "
                f"must be finite: lower --lr, which is {self._settings.peak:g}"
            )

    def _scores(self) -> dict[str, float]:
        found = {}
        for suffix, (rows, labels) in self._validation.items():
            predicted = np.concatenate(list(self._predictions(rows)))
            for name in self._task.metrics:
                found[name + suffix] = METRICS[name](predicted, labels)
        return found

    @torch.no_grad()
    def _predictions(self, rows: list[list[int]]) -> Iterator[np.ndarray]:
        """Numbers of classes, or similarities, of the rows in order."""
        self.model.eval()
        size = self._settings.batch_size
        for start in range(0, len(rows), size):
            batch = self._encoding.batch(rows[start : start + size], self._device)
            logits = self.model(**batch).logits
            values = logits[:, 0] if self._task.is_regression else logits.argmax(-1)
            yield values.double().cpu().numpy()

    def _tell(self, epoch: int, loss: float, scores: dict[str, float], seconds: float) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        sys.stderr.write(
            f"{self._task.name} seed {self._seed} epoch {epoch}/{self._settings.epochs}: "
            f"loss {loss:.4f}, {shown} ({seconds:.0f} s)\n"
        )


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example.label for example in examples])
