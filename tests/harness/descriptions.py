"""The run file of a model that trains in seconds, written in one place. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MODEL = {
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


def describe(
    directory: Path,
    method: Mapping[str, object],
    stage: int,
    data: Mapping[str, Path],
    **sections: Mapping[str, object],
) -> dict[str, Any]:
    """A run of 11 updates in fp32 that reports each of them and evaluates at every fifth.

    Args:
        directory: for its results, in `run`; its model and its DeepSpeed file are written there.
        method: its section.
        stage: of ZeRO.
        data: files by key of the section.
        sections: further keys by section, or others in place of those here.

    Returns:
        The content of its run file.
    """
    run: dict[str, Any] = {
        "output_dir": str(directory / "run"),
        "model": str(write_model(directory)),
        "deepspeed": str(write_zero(directory, stage)),
        "method": dict(method),
        "data": {key: str(path) for key, path in data.items()},
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
        "checkpoint": {"every": 5, "keep": None},
        "log": {"every": 1},
    }
    for section, values in sections.items():
        run[section] = {**run.get(section, {}), **values}
    return run


def write_model(directory: Path, **changed: object) -> Path:
    """A model of two layers and a vocabulary of 512, with other values where they are given."""
    path = directory / "model.json"
    path.write_text(json.dumps({**_MODEL, **changed}))
    return path


def write_zero(directory: Path, stage: int) -> Path:
    """The DeepSpeed file of a stage."""
    path = directory / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return path
