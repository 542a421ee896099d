"""A small tokenizer and token files made of given ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from relora_ds.data.token_files.megatron import indexed_dataset_module
from relora_ds.data.tokenizer import Tokenizer, train_tokenizer
from relora_ds.data.tokens import TokenFile

SENTENCES = [
    "The quick brown fox jumps over the lazy dog while 1234 cats watch from the wall.",
    "Low-rank matrices carry most of what a model learns, and the rest is noise.",
    "A merge leaves the function of the model unchanged, to within a tolerance.",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of three lines."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    documents = ["\n".join(f"{line} {n}" for line in SENTENCES) for n in range(40)]
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file: Path) -> Tokenizer:
    """A tokenizer with 400 ids."""
    return train_tokenizer([text_file], 400, text_file.with_name("tokenizer.model"))


@pytest.fixture
def write_tokens(tmp_path: Path) -> Callable[..., TokenFile]:
    """Write documents of given ids with Megatron's own builder, without a description."""

    def write(
        documents: Sequence[Sequence[int]], name: str = "tokens", dtype: type = np.uint16
    ) -> TokenFile:
        prefix = tmp_path / name
        builder = indexed_dataset_module().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids in documents:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        return TokenFile(prefix)

    return write
