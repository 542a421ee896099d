"""The dense model in a checkpoint, for evaluation, initialisation and export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from relora_ds.checkpoint.saved_run import SavedRun, open_saved_run
from relora_ds.checkpoint.saved_state import AsSaved, WorkingValues
from relora_ds.config.methods.full import FullConfig
from relora_ds.config.sections import TrainConfig
from relora_ds.data.tokenizer import tokenizers_in
from relora_ds.errors import CheckpointError
from relora_ds.methods.build import build_model, dense_weights, filled_model
from relora_ds.methods.full import Full
from relora_ds.model.hf.weights import read_hf
from relora_ds.model.init import EMBEDDING, HEAD
from relora_ds.model.llama import Llama


class DenseModel:
    """The dense model in a checkpoint of ours or in a Hugging Face directory.

    Args:
        path: `step_N`, a directory that holds `latest`, a run directory, or an HF directory.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Path | None
        """File of the tokenizer, if one is there; see `data.tokenizer.tokenizer_file`."""
        self.seq_length: int | None = None
        """What the run trained on; an HF directory does not say."""
        self._source: SavedRun | Mapping[str, torch.Tensor]
        if (path / "config.json").is_file():
            self.architecture, self._source = read_hf(path)
            directory = path
        else:
            self._source = open_saved_run(path)
            directory = self._source.checkpoint
            self.architecture = self._source.record.architecture
            self.seq_length = self._source.record.config.train.seq_length
        self.directory = directory
        """Where its files lie."""
        self.tokenizer = next(iter(tokenizers_in(directory)), None)

    @property
    def saved(self) -> SavedRun | None:
        """The checkpoint; None of a Hugging Face directory."""
        return self._source if isinstance(self._source, SavedRun) else None

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Every parameter by its Hugging Face name, fp32 on the CPU, read when it is asked for."""
        saved = self._source
        if not isinstance(saved, SavedRun):
            return _InFp32(saved)
        if not saved.method.has_dense_weight:
            raise CheckpointError(
                f"{saved.checkpoint}: method {saved.method.config.name} has no dense weights that "
                "compute the same: the checkpoint can be resumed and evaluated, but not exported "
                "or started from"
            )
        values = WorkingValues(saved.state())
        return dense_weights(self.architecture, saved.method, saved.record.config.train, values)

    def stored_weights(self) -> Mapping[str, torch.Tensor]:
        """Every parameter by its Hugging Face name on the CPU, read when it is asked for.

        In the dtype that it is kept in where the model was made elsewhere, otherwise in fp32.
        """
        saved = self._source
        if not isinstance(saved, SavedRun):
            return saved
        return AsSaved(saved.state()) if saved.is_import else self.weights()

    def model(self, train: TrainConfig, device: torch.device) -> Llama:
        """The model to compute with, in fp32: the dense one where there is one, else the
        method's own."""
        saved = self._source
        if isinstance(saved, SavedRun) and not saved.method.has_dense_weight:
            values = WorkingValues(saved.state())
            return filled_model(
                self.architecture, saved.method, train, lambda name, _: values[name], device
            )
        weights, full = self.weights(), Full(FullConfig(name="full"), seed=0, steps=1)
        return build_model(
            self.architecture, full, train, lambda name, shape: weights[name], device
        )


class _InFp32(Mapping[str, torch.Tensor]):
    """Weights of any float type, cast on access."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class FiniteWeights(Mapping[str, torch.Tensor]):
    """Weights of which none that is read may be NaN or infinite.

    Args:
        weights: read on access.
        source: where they are from, for the message.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], source: Path) -> None:
        self._weights, self._source = weights, source

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{self._source}: {name} holds values that are not finite: the model there "
                "diverged or the file is damaged; start from another one"
            )
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # the inherited one would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class ResizedVocabulary(Mapping[str, torch.Tensor]):
    """Weights of a model for a vocabulary of another size.

    Rows beyond a smaller one are left out. Those beyond a larger one are the mean of all that are
    there: what nobody has trained yet is as likely as the average word, where a row at random may
    be likelier than all others.

    Args:
        weights: fp32, read on access.
        rows: of embedding and head.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], rows: int) -> None:
        self._weights, self._rows = weights, rows

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        missing = self._rows - len(weight) if name in (EMBEDDING, HEAD) else 0
        if missing <= 0:
            return weight[: self._rows] if missing else weight
        mean = weight.double().mean(0, keepdim=True).to(weight.dtype)
        return torch.cat([weight, mean.expand(missing, -1)])

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
