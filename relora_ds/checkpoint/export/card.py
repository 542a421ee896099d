"""The model card of an export: what was trained, how, on what, and the command that repeats it.

Every figure is one that the run itself wrote. Of the run's settings the card holds those that the
weights depend on; credentials in them are masked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from relora_ds.checkpoint.format import layout
from relora_ds.checkpoint.format.record import RunRecord
from relora_ds.config.model import ModelConfig
from relora_ds.files.objects import parse_object, read_object
from relora_ds.files.regular import open_regular
from relora_ds.model.hf.directory import CARD, RUN, ZERO
from relora_ds.model.init import dense_shapes
from relora_ds.redaction import redact

_BEGIN, _END = "<!-- lm-eval -->\n", "<!-- end of lm-eval -->\n"
_LEFT_OUT = ("checkpoint", "log")  # they change no weight, and name places of one machine
_FIGURES = {
    "train/loss": "training loss, of the last step that was reported",
    "eval/loss": "validation loss, nats per token",
    "eval/perplexity": "validation perplexity",
}
_DIGITS = 12  # of a hash, which tell files apart


@dataclass(frozen=True)
class Results:
    """What a run wrote beside its checkpoints; nothing where that is not at hand."""

    figures: Mapping[str, float] = field(default_factory=dict)
    """Last value of each metric until the checkpoint."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """`summary.json`, of which versions and hardware are told."""


def results_of(checkpoint: Path, step: int) -> Results:
    """The results that lie where a run puts them, beside its directory of checkpoints.

    Args:
        checkpoint: `step_N` of the run.
        step: of it; later figures are of another model.
    """
    directory = checkpoint.resolve().parent
    if directory.name != layout.CHECKPOINTS:
        return Results()
    figures: dict[str, float] = {}
    for line in _objects(directory.with_name("metrics.jsonl")):
        if isinstance(line.get("step"), int) and line["step"] <= step:
            figures |= {key: line[key] for key in _FIGURES if isinstance(line.get(key), float)}
    return Results(figures, read_object(directory.with_name("summary.json")) or {})


def card_files(record: RunRecord, results: Results, dtype: str) -> dict[str, str]:
    """Contents of the card and of the files that its command names, by file name.

    Args:
        record: what the checkpoint says of itself.
        results: of its run.
        dtype: what the tensors are stored in.
    """
    zero = {"zero_optimization": {"stage": record.trainer.zero_stage}}
    return {
        CARD: "".join(_card(record, results, dtype)),
        RUN: yaml.safe_dump(_settings(record), sort_keys=False, allow_unicode=True),
        ZERO: json.dumps(zero, indent=1) + "\n",
    }


def with_scores(card: str, rows: Iterable[tuple[str, str, float]]) -> str:
    """A card with the results of lm-eval, in place of those that it had.

    Args:
        rows: task, metric and value.
    """
    table = _table(("task", "metric", "value"), ((*key, f"{value:.4f}") for *key, value in rows))
    section = f"{_BEGIN}\n## Evaluation by lm-eval\n\n{table}\n{_END}"
    if _BEGIN in card and _END in card:
        return card[: card.index(_BEGIN)] + section + card[card.index(_END) + len(_END) :]
    return f"{card.rstrip()}\n\n{section}"


def parameter_count(architecture: ModelConfig) -> int:
    """Parameters of the dense model, a tied head counted once."""
    return sum(math.prod(shape) for shape in dense_shapes(architecture).values())


def _card(record: RunRecord, results: Results, dtype: str) -> Iterator[str]:
    config, state = record.config, record.trainer
    method, begun = config.method, config.train.init_from
    kind = ["low-rank"] if method.low_rank is not None else []
    about = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["relora_ds", "llama", "pre-training", *kind, method.name],
    }
    done = "pre-trained" if begun is None else f"trained further from `{Path(begun).name}`"
    name = Path(config.output_dir).name or "model"
    yield f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n# {name}\n\n"
    yield (
        f"A LLaMA model of {parameter_count(record.architecture):,} parameters, {done} with "
        f"{method.title or method.name} on {state.tokens:,} tokens by relora_ds, without "
        f"instruction tuning or safety training. Weights are stored in {dtype}.\n\n"
    )
    yield "## Training\n\n" + _table(("", ""), _training(record)) + "\n"
    figures = [(what, results.figures.get(key)) for key, what in _FIGURES.items()]
    known = [(what, f"{value:.4f}") for what, value in figures if value is not None]
    if known:
        yield f"## Results after step {state.step:,}\n\n" + _table(("", ""), known) + "\n"
    used = list(_hardware(results.summary))
    if used:
        yield "## Hardware and versions\n\n" + _table(("", ""), used) + "\n"
    yield _repeat(record)


def _training(record: RunRecord) -> Iterator[tuple[str, str]]:
    config, state = record.config, record.trainer
    settings = redact(config.method.model_dump(mode="json", exclude={"name"}))
    yield "method", f"{config.method.name}: {_inline(settings)}"
    yield "steps", f"{state.step:,} of {config.train.steps:,}"
    length, batch = config.train.seq_length, config.train.global_batch_size
    yield "tokens per step", f"{batch} sequences of {length}"
    yield "optimizer", _inline(_chosen(config.optimizer.model_dump(mode="json")))
    yield "schedule", _inline(config.schedule.model_dump(mode="json", exclude_none=True))
    yield "precision", config.train.precision
    yield "seed", str(config.train.seed)
    yield "data", _data(record)
    parallel = f"{state.dp_size} data-parallel x {state.tp_size} tensor-parallel processes"
    if (islands := config.parallel.islands) > 1:
        yield "islands", _inline(config.islands.model_dump(mode="json"))
        parallel = f"{islands} islands x {parallel}"
    yield "topology", f"{parallel}, ZeRO stage {state.zero_stage}"


def _chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those of what was not chosen, which have a section each."""
    named = [value for value in settings.values() if isinstance(value, str)]
    kept = {k: v for k, v in settings.items() if not isinstance(v, dict) or k in named}
    return {key: value for key, value in kept.items() if value is not None}


def _data(record: RunRecord) -> str:
    data = record.config.data
    if data.source == "builtin":
        return "the builtin corpus of relora_ds (English documentation that ships with Python)"
    prefixes = [data.train] if isinstance(data.train, str) else [p for _, p in data.train or ()]
    names = ", ".join(f"`{Path(prefix).name}`" for prefix in prefixes)
    prints = ", ".join(f"`{_shortened(each)}`" for each in record.trainer.data_fingerprints)
    return f"token files {names}; fingerprints, training files first: {prints}"


def _shortened(fingerprint: str) -> str:
    """A fingerprint with the beginning of its hash; what was hashed stands before a colon."""
    what, colon, digest = fingerprint.rpartition(":")
    return f"{what}{colon}{digest[:_DIGITS]}"


def _hardware(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for section in ("hardware", "versions"):
        values = summary.get(section)
        for key, value in values.items() if isinstance(values, dict) else ():
            if value not in (None, 0):
                yield key.replace("_", " "), str(value)


def _repeat(record: RunRecord) -> str:
    processes = record.trainer.dp_size * record.trainer.tp_size
    processes *= record.config.parallel.islands
    command = f"relora-ds train {RUN}"
    if processes > 1:
        command = f"torchrun --nproc_per_node {processes} --no-python {command}"
    text = (
        f"## Repeat it\n\n```bash\n{command}\n```\n\nin this folder, with the versions above. "
        f"`{RUN}` is the run as it was resolved, with this folder's `config.json` as its model; "
        f"`{ZERO}` is the ZeRO stage."
    )
    if record.config.data.source != "builtin":
        text += (
            " The paths in its section `data` are those of the machine that it ran on: put there "
            "token files with the fingerprints above, written by `relora-ds prepare-data`."
        )
    return f"{text}\n"


def _settings(record: RunRecord) -> dict[str, Any]:
    """The run file that repeats the training from within the export."""
    run = redact(record.config.model_dump(mode="json", exclude=set(_LEFT_OUT)))
    name = Path(record.config.output_dir).name or "model"
    return run | {"output_dir": f"runs/{name}", "model": "config.json", "deepspeed": ZERO}


def _inline(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False).replace("|", "\\|")
    return f"`{text}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of one JSON value per line; a torn line and a missing file hold none."""
    try:
        with open_regular(path) as lines:
            yield from filter(None, map(parse_object, lines))
    except OSError:
        return
