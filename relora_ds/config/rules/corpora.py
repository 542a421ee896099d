"""Rules on the text that a run trains on."""

from __future__ import annotations

from collections.abc import Iterator

from relora_ds.config.model import ModelConfig
from relora_ds.config.reading.document import Finding
from relora_ds.config.sections import DataConfig, EvalConfig, TrainConfig


def data_keys_match_source(data: DataConfig) -> Iterator[Finding]:
    if data.source == "builtin":
        for key in ("train", "valid", "valid_share", "tokenizer"):
            if getattr(data, key) is not None:
                yield Finding(
                    ("data", key),
                    "is ignored with data.source builtin: remove it, or write source: files",
                )
        return
    for key, other in (("train", ""), ("valid", ", or valid_share for a part of data.train")):
        if not getattr(data, key) and (key == "train" or data.valid_share is None):
            yield Finding(
                ("data", key),
                "is needed with data.source files: give the prefix that tools/prepare_data.py "
                f"wrote{other}, or write source: builtin to try things out",
            )
    if data.valid and data.valid_share:
        yield Finding(("data", "valid_share"), "is given beside data.valid: remove one of them")
    for key in ("builtin_vocab_size", "cache_dir"):
        # a default that is written out, as in a dumped run, does no harm
        if getattr(data, key) != DataConfig.model_fields[key].default:
            yield Finding(
                ("data", key),
                "is ignored with data.source files: remove it, or write source: builtin",
            )


def rows_have_documents(data: DataConfig, eval: EvalConfig) -> Iterator[Finding]:
    if eval.protocol == "galore_compat" and data.valid_share:
        yield Finding(
            ("eval", "protocol"),
            "is galore_compat, whose rows are documents of a validation file of its own: name one "
            "with data.valid in place of data.valid_share, or write exact",
        )


def rows_have_targets(train: TrainConfig, eval: EvalConfig) -> Iterator[Finding]:
    if eval.protocol == "galore_compat" and train.seq_length == 1:
        yield Finding(
            ("train", "seq_length"),
            "is 1, but eval.protocol is galore_compat, whose rows predict every token but the "
            "first: write 2 or more, or eval.protocol: exact",
        )


def validation_is_held_out(data: DataConfig) -> Iterator[Finding]:
    trained = data.train if isinstance(data.train, list) else [(1.0, data.train)]
    if data.valid and data.valid in [prefix for _, prefix in trained]:
        yield Finding(
            ("data", "valid"),
            f"is {data.valid}, which data.train holds too: its loss tells what is remembered, not "
            "what was learnt; name another file, or valid_share in its place",
        )


def builtin_vocabulary_fits_model(data: DataConfig, architecture: ModelConfig) -> Iterator[Finding]:
    size, rows = data.builtin_vocab_size, architecture.vocab_size
    if data.source == "builtin" and size > rows:
        yield Finding(
            ("data", "builtin_vocab_size"),
            f"is {size}, but the model's vocab_size is {rows}: write {rows} or less",
        )
