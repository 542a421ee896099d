"""Batches of token windows for training and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from relora_ds.data.sampler import SampleOrder, rank_positions
from relora_ds.data.token_files.samples import Samples, TokenStream
from relora_ds.data.tokens import TokenFile
from relora_ds.errors import ConfigError, DataError

_CHUNK = 1 << 22  # tokens counted at once


class TrainingBatches:
    """The training data of one data-parallel rank: a pure function of the step.

    Args:
        files: token files of the blend, or the parts of them that are trained on.
        weights: one positive weight per file, any scale.
        seq_length: tokens S that the model reads; samples hold S + 1.
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples M per rank and forward pass.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: number of data-parallel ranks.
        seed: seed of the run.

    Raises:
        ConfigError: the global batch cannot be cut into equal micro-batches.
        DataError: a file is shorter than one sample, or the weights do not suit the files.
    """

    def __init__(
        self,
        files: Sequence[TokenStream],
        weights: Sequence[float],
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ) -> None:
        if global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                f"micro_batch_size {micro_batch_size} times {dp_size} data-parallel ranks; "
                "change one of them"
            )
        if len(files) != len(weights):
            raise DataError(f"{len(files)} token files, but {len(weights)} blend weights")
        sizes = tuple(file.num_samples(seq_length) for file in files)
        self.order = SampleOrder(sizes, tuple(weights), seed)
        self._files = files
        self._seq_length = seq_length
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step on each rank."""
        return self._global_batch_size // (self._micro_batch_size * self._dp_size)

    def micro_batches(self, step: int) -> Iterator[torch.Tensor]:
        """This rank's micro-batches of optimizer step `step` (from 0), read as they are asked for.

        Yields:
            int64 of shape (M, S + 1): inputs are `[:, :-1]`, targets `[:, 1:]`.
        """
        positions = rank_positions(
            step, self._global_batch_size, self._micro_batch_size, self._dp_rank, self._dp_size
        )
        datasets, samples = self.order.locate(positions)
        for row_datasets, row_samples in zip(datasets, samples, strict=True):
            rows = [
                self._files[dataset].sample(int(sample), self._seq_length)
                for dataset, sample in zip(row_datasets, row_samples, strict=True)
            ]
            yield torch.from_numpy(np.stack(rows))

    def samples(self, step: int) -> list[list[tuple[int, int]]]:
        """What step `step` (from 0) reads on every data-parallel rank: (file, sample) by row, in
        the order of its micro-batches."""
        found = []
        for rank in range(self._dp_size):
            positions = rank_positions(
                step, self._global_batch_size, self._micro_batch_size, rank, self._dp_size
            )
            files, samples = self.order.locate(positions)
            found.append([*zip(files.flat, samples.flat, strict=True)])
        return found

    def name(self, file: int) -> str:
        """Prefix of a token file of the blend, by its number."""
        return self._files[file].prefix

    def epochs(self, steps: int) -> tuple[float, ...]:
        """Passes over each file that the first `steps` optimizer steps make."""
        return tuple(n / size for n, size in zip(self._uses(steps), self.order.sizes, strict=True))

    def tokens(self, steps: int) -> tuple[int, ...]:
        """Tokens of each file that the first `steps` optimizer steps are given as targets."""
        return tuple(n * self._seq_length for n in self._uses(steps))

    def figures(self, steps: int) -> dict[str, float]:
        """Tokens and epochs of each source by metric name, after so many optimizer steps."""
        names = source_names([file.prefix for file in self._files])
        tokens, epochs = self.tokens(steps), self.epochs(steps)
        figures: dict[str, float] = {}
        for name, count, passes in zip(names, tokens, epochs, strict=True):
            figures |= {f"data/tokens/{name}": count, f"data/epochs/{name}": passes}
        return figures

    def _uses(self, steps: int) -> list[int]:
        """Samples of each file that the first `steps` optimizer steps take."""
        return self.order.blend.uses(steps * self._global_batch_size).tolist()


class ValidationBatches:
    """Windows 0, 1, 2, ... of the validation set, spread over the data-parallel ranks.

    Every rank gets the same number of micro-batches, since each is a collective operation; rows
    that are missing at the end are zeros that the mask excludes. The tokens after the last whole
    window are not used.

    Args:
        samples: the validation set.
        seq_length: tokens S that the model reads; windows hold S + 1.
        micro_batch_size: rows M per rank and forward pass.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: number of data-parallel ranks.
        max_sequences: windows to use at most; None takes all.

    Raises:
        DataError: the set is shorter than one window.
    """

    def __init__(
        self,
        samples: Samples,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        max_sequences: int | None = None,
    ) -> None:
        available = samples.num_samples(seq_length)
        self.num_sequences = available if max_sequences is None else min(available, max_sequences)
        """Windows over all ranks; each has S targets."""
        self._samples = samples
        self._seq_length = seq_length
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.num_sequences // (self._micro_batch_size * self._dp_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's micro-batches.

        Yields:
            Tokens, int64 of shape (M, S + 1), and a bool mask of shape (M,) that is True where the
            row is a window of the set.
        """
        rows = self._micro_batch_size
        for number in range(len(self)):
            first = (number * self._dp_size + self._dp_rank) * rows
            windows = range(first, min(first + rows, self.num_sequences))
            tokens = torch.zeros(rows, self._seq_length + 1, dtype=torch.int64)
            for row, window in enumerate(windows):
                tokens[row] = torch.from_numpy(self._samples.sample(window, self._seq_length))
            yield tokens, torch.arange(rows) < len(windows)

    def has_targets(self, document_end: int | None) -> bool:
        """Whether anything is predicted in the windows of all ranks.

        Args:
            document_end: id behind which a token is no target, where documents are kept apart.
        """
        windows = (self._samples.sample(n, self._seq_length) for n in range(self.num_sequences))
        return any((tokens[:-1] != document_end).any() for tokens in windows)


class DocumentBatches:
    """Documents of a token file as padded rows, by the protocol of GaLore's published tables.

    A row is the beginning of a document, cut to S tokens, the last of which is then the id that
    ends documents, as T5's tokenizer cuts. Documents are dealt out to the ranks one by one. A rank
    stops with the micro-batch after the one with which its own count of tokens, times the ranks,
    passes `TARGET_TOKENS`: micro-batches are whole. Every rank gets the same number of them, since
    each is a collective operation; those behind a rank's own last one are masked out.

    Args:
        file: token file of the validation set.
        seq_length: tokens S of a row; S - 1 of them are targets at most.
        micro_batch_size: rows M per rank and forward pass.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: number of data-parallel ranks.
        max_documents: documents to use at most; None for all that the protocol asks for.
        multiple: what the number P of positions that a model reads is a multiple of; S - 1 of them
            are the protocol's, and what is added is masked out.
    """

    TARGET_TOKENS = 10_000_000

    def __init__(
        self,
        file: TokenFile,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        max_documents: int | None = None,
        multiple: int = 1,
    ) -> None:
        self._positions = -(-(seq_length - 1) // multiple) * multiple
        self._file, self._seq_length, self._rows = file, seq_length, micro_batch_size
        self._rank, self._size = dp_rank, dp_size
        self._eos = file.metadata.eos_id if file.metadata else None
        available = file.num_documents
        documents = available if max_documents is None else min(available, max_documents)
        self._shares = [self._share(range(rank, documents, dp_size)) for rank in range(dp_size)]

    def _share(self, documents: range) -> range:
        """Documents that a rank comes to, of those that are dealt to it."""
        seen = 0
        for first in range(0, len(documents), self._rows):
            if seen > self.TARGET_TOKENS:
                return documents[:first]
            rows = documents[first : first + self._rows]
            seen += self._size * sum(self._length(number) for number in rows)
        return documents

    def _length(self, document: int) -> int:
        whole = self._file.document_start(document + 1) - self._file.document_start(document)
        return min(whole, self._seq_length)

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return max(-(-len(share) // self._rows) for share in self._shares)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's micro-batches.

        Yields:
            Tokens, int64 of shape (M, P + 1), and a bool mask of shape (M, P) that is True where
            the target is a token of a document.
        """
        own = self._shares[self._rank]
        for number in range(len(self)):
            tokens = torch.zeros(self._rows, self._positions + 1, dtype=torch.int64)
            lengths = torch.zeros(self._rows, 1, dtype=torch.int64)
            for row, document in enumerate(own[number * self._rows : (number + 1) * self._rows]):
                ids = self._row(document)
                tokens[row, : len(ids)] = torch.from_numpy(ids)
                lengths[row] = len(ids)
            yield tokens, torch.arange(1, self._positions + 1) < lengths

    def has_targets(self, document_end: int | None) -> bool:
        """Whether anything is predicted in the rows of all ranks.

        Args:
            document_end: id behind which a token is no target, where documents are kept apart.
        """
        rows = (self._row(document) for share in self._shares for document in share)
        return any((ids[:-1] != document_end).any() for ids in rows)

    def _row(self, document: int) -> np.ndarray:
        start, length = self._file.document_start(document), self._length(document)
        ids = self._file.window(start, length)
        if self._eos is not None and start + length < self._file.document_start(document + 1):
            ids[-1] = self._eos
        return ids


def unigram_perplexity(
    samples: Samples,
    seq_length: int,
    max_sequences: int | None = None,
    document_end: int | None = None,
) -> float:
    """Perplexity of the best model without context on the targets that `ValidationBatches` covers.

    That is exp of the entropy of the targets' empirical distribution: a trained model must stay
    below.

    Args:
        samples: the validation set.
        seq_length: tokens per window that a model reads.
        max_sequences: windows to use at most; None takes all.
        document_end: id behind which a token is no target, where documents are kept apart.

    Raises:
        DataError: the set is shorter than one window.
    """
    available = samples.num_samples(seq_length)
    sequences = available if max_sequences is None else min(available, max_sequences)
    counts = np.zeros(samples.max_token_id + 1, dtype=np.int64)
    at_once = max(1, _CHUNK // seq_length)
    for first in range(0, sequences, at_once):
        windows = range(first, min(first + at_once, sequences))
        rows = np.stack([samples.sample(each, seq_length) for each in windows])
        targets = rows[:, 1:]  # the first token of a window is no target of its own
        if document_end is not None:
            targets = targets[rows[:, :-1] != document_end]
        counts += np.bincount(targets.ravel(), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def source_names(prefixes: Sequence[str]) -> list[str]:
    """A short name for each token file: as many last parts of its path as tell it from the others.

    Files that are named twice are told apart by their place.
    """
    parts = [Path(prefix).parts for prefix in prefixes]
    names = []
    for number, own in enumerate(parts):
        others = [each for each in parts if each != own]
        count = next(
            (n for n in range(1, len(own)) if all(each[-n:] != own[-n:] for each in others)),
            len(own),
        )
        name = str(Path(*own[-count:]))
        names.append(f"{name}#{number + 1}" if parts.count(own) > 1 else name)
    return names
