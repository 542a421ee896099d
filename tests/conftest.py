"""What all tests share: a small real corpus, and programs that import the package under test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.descriptions import describe

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, Triton interprets; it has to know before a test module imports it."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # a process of pytest-xdist that runs no test
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def package_under_test() -> Iterator[None]:
    """Programs that tests start import the package beside the tests, whichever is installed."""
    before = os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{before}" if before else str(ROOT))
        yield


@dataclass(frozen=True)
class TinyCorpus:
    """Token files of a few hundred kilobytes of English prose."""

    train: Path
    valid: Path
    tokenizer: Path
    text: Path

    @property
    def files(self) -> dict[str, Path]:
        """What a run trains on, by key of its section `data`."""
        return {"train": self.train, "valid": self.valid, "tokenizer": self.tokenizer}


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Python's language reference, tokenised with a vocabulary of 512."""
    from pydoc_data.topics import topics

    from relora_ds.data.prepare import prepare
    from relora_ds.data.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("corpus")
    names = sorted(topics)
    for part, chosen in (("train", names[:40]), ("valid", names[40:46])):
        (directory / f"{part}.txt").write_text("\n\n".join(topics[name] for name in chosen))
    tokenizer = directory / "tokenizer.model"
    train_tokenizer([str(directory / "train.txt")], 512, str(tokenizer))
    for part in ("train", "valid"):
        prepare([str(directory / f"{part}.txt")], str(tokenizer), str(directory / part))
    return TinyCorpus(directory / "train", directory / "valid", tokenizer, directory / "train.txt")


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_corpus: TinyCorpus) -> dict[str, Any]:
    """A run description of a few seconds: warm start, then ReLoRA with two merges."""
    method = {
        "name": "relora",
        "rank": 4,
        "merge_every": 3,
        "restart_warmup_steps": 1,
        "warm_start_steps": 3,
    }
    return describe(tmp_path, method, 2, tiny_corpus.files, checkpoint={"every": 1})
