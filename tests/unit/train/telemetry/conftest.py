"""A run description to report about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from relora_ds.config.schema import RunConfig


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """Builds a run description with the given `log` section."""

    def make(**log: Any) -> RunConfig:
        return RunConfig.model_validate(
            {
                "output_dir": "runs/test",
                "model": "model.json",
                "deepspeed": "zero.json",
                "method": {"name": "full"},
                "train": {
                    "steps": 100,
                    "seq_length": 8,
                    "micro_batch_size": 1,
                    "global_batch_size": 2,
                },
                "log": log,
            }
        )

    return make
