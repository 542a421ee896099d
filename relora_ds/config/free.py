"""The keys of a run file that may differ between a checkpoint and the run that continues it."""

from __future__ import annotations

from relora_ds.config.base import Section

# Neither the trained function nor the order of the data depends on these.
_FREE = (
    "output_dir",
    "eval",
    "checkpoint",
    "log",
    "deepspeed",
    "model",
    "data.cache_dir",
    "data.train",
    "data.valid",
    "data.tokenizer",
    "train.micro_batch_size",
    "train.attention",
    "train.activation_checkpointing",
    "train.digest_every",
    "train.timeout_minutes",
    "train.init_from",
    "parallel",
)


def free_keys(model: type[Section]) -> frozenset[str]:
    """Dotted keys that a resumed run may change; a section stands for everything below it."""
    return frozenset(key for key in _FREE if key.partition(".")[0] in model.model_fields)
