"""What a checkpoint can be written down for, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.checkpoint.rewriting.reshape import reshape_checkpoint
from relora_ds.checkpoint.saved_run import open_saved_run
from relora_ds.errors import ConfigError
from tests.golden.make_checkpoint import checkpoint

GOLDEN = checkpoint("relora", 2)


def test_a_smaller_micro_batch_may_be_set_at_resume(tmp_path: Path) -> None:
    train = open_saved_run(GOLDEN).record.config.train
    processes = train.global_batch_size
    assert train.micro_batch_size > 1, "so many processes need a smaller one"
    reshape_checkpoint(GOLDEN, tmp_path / "out", dp_size=processes, stage=1)
    assert open_saved_run(tmp_path / "out").record.trainer.dp_size == processes


def test_what_does_not_divide_is_named_with_its_argument(tmp_path: Path) -> None:
    total = open_saved_run(GOLDEN).record.config.train.global_batch_size
    with pytest.raises(ConfigError) as error:
        reshape_checkpoint(GOLDEN, tmp_path / "out", dp_size=total + 1, tp_size=3)
    batch, heads = error.value.problems
    assert batch.startswith(f"--data-parallel is {total + 1}, but must divide the run's")
    assert batch.endswith(f"take {total}")
    assert heads.startswith("--tensor is 3, but must divide the model's num_")
