"""What all tests share: a small real corpus, and programs that import the package under test."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    return {
        "output_dir": str(tmp_path / "run"),
        "model": str(tmp_path / "model.json"),
        "deepspeed": str(tmp_path / "zero.json"),
        "method": {
            "name": "relora",
            "rank": 4,
            "merge_every": 3,
            "restart_warmup_steps": 1,
            "warm_start_steps": 3,
        },
        "data": {
            "train": str(tiny_corpus.train),
            "valid": str(tiny_corpus.valid),
            "tokenizer": str(tiny_corpus.tokenizer),
        },
        "train": {
            "steps": 11,
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "eval": {"every": 5, "batches": 2},
        "checkpoint": {"every": 1, "keep": None},
        "log": {"every": 1},
    }
