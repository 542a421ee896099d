"""What a run left behind, in a form that two runs can be compared by."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_OF_THE_START = re.compile(
    r"^throughput/|seconds|memory/(max|build)_allocated|^communication/|^checkpoint/"
)
"""Figures of a line of metrics.jsonl that tell of this machine and this start, not of the run. At
stage 3, DeepSpeed's first update after a start moves more: it has no trace to follow yet. The size
of a checkpoint follows the length of the paths in its run file."""


_OF_NO_RESULT = re.compile(
    r"^(logs|checkpoints/step_\d+|previous_\d+/checkpoints)(/|$)|^previous_\d+$"
)
"""What may be there or not: logs, checkpoints of a line that was left, and checkpoints: a run that
was asked to stop has one more. What a try left that came to nothing may not be set aside."""


@dataclass(frozen=True)
class Outcome:
    """A run's results.

    Args:
        lines: of metrics.jsonl in order, without figures of the start that wrote them.
        checkpoint: name of the last one.
        state: what it holds, by file and entry: hashes of tensors, and plain values.
        export: hashes of the exported tensors by name.
        status: in summary.json.
        final: last figures in summary.json, without those of the start that wrote them, and those
            of memory, which a start that finds nothing left to train does not know.
        files: names of everything else that is left.
    """

    lines: list[dict[str, Any]]
    checkpoint: str
    state: dict[str, Any]
    export: dict[str, str]
    status: str
    final: dict[str, Any]
    files: list[str]


def outcome(output_dir: Path) -> Outcome:
    """What a completed run left behind."""
    checkpoints = output_dir / "checkpoints"
    last = (checkpoints / "latest").read_text()
    summary = json.loads((output_dir / "summary.json").read_text())
    names = [str(path.relative_to(output_dir)) for path in output_dir.rglob("*")]
    return Outcome(
        lines(output_dir),
        last,
        state(checkpoints / last),
        exported(output_dir / "hf"),
        summary["status"],
        {k: v for k, v in _without_the_start(summary["final"]).items() if k[:7] != "memory/"},
        sorted(name for name in names if not _OF_NO_RESULT.match(name)),
    )


def exported(directory: Path) -> dict[str, str]:
    """Hashes of the tensors of an exported model, by name."""
    return {name: sha256(t) for name, t in load_file(directory / "model.safetensors").items()}


def lines(output_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without figures of the start that wrote them."""
    read = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    return [_without_the_start(line) for line in read]


def _without_the_start(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if not _OF_THE_START.search(key)}


def state(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint but where it lies: hashes of tensors and plain values."""
    found: dict[str, Any] = {}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".pt":
            found |= {f"{path.name}{k}": v for k, v in _leaves(_unpickled(path))}
        elif path.suffix == ".safetensors":
            found |= {f"{path.name}/{k}": sha256(t) for k, t in load_file(path).items()}
        elif path.name == "trainer.json":
            found |= {f"{path.name}{k}": v for k, v in _leaves(json.loads(path.read_text()))}
    found.pop("trainer.json/sha256/run.yaml", None)  # it says where the run lies
    return found


def difference(found: Outcome, expected: Outcome) -> str:
    """What differs first between two runs; empty if nothing does."""
    for number, (ours, theirs) in enumerate(zip(found.lines, expected.lines, strict=False)):
        if ours != theirs:
            keys = [k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)]
            pairs = {k: (ours.get(k), theirs.get(k)) for k in sorted(keys)}
            return f"line {number + 1} of metrics.jsonl, step {theirs['step']}: {pairs}"
    if len(found.lines) != len(expected.lines):
        return f"{len(found.lines)} lines of metrics.jsonl, not {len(expected.lines)}"
    for part in ("checkpoint", "state", "export", "status", "final"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        if isinstance(ours, dict):
            keys = [k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)]
            ours, theirs = ({k: part.get(k) for k in sorted(keys)[:3]} for part in (ours, theirs))
        if ours != theirs:
            return f"{part}: {ours}, not {theirs}"
    more, fewer = set(found.files) - set(expected.files), set(expected.files) - set(found.files)
    return f"files: {sorted(more)} too many, {sorted(fewer)} missing" if more | fewer else ""


def sha256(tensor: torch.Tensor) -> str:
    """Hash of a tensor's type, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # we wrote it ourselves


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values below a node, each with its path."""
    if isinstance(node, torch.Tensor):
        yield path, sha256(node)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}/{key}")
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{path}/{number}")
    elif isinstance(node, str | int | float | bool | None):
        yield path, node
