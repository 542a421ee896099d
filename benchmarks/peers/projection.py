"""One projection, forward and backward, beside the layer that the method's authors published.

Both have the same weights and take turns; outputs and gradients are compared before anything is
timed. A turn of ours is an update of one micro-batch: the weight in effect is composed within it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.peers.authors import find_authors
from relora_ds.config.schema import RunConfig
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.parallel.linear import LinearSpec, Projection, weights_stay

SHAPES = ((512, 1376, 128), (1024, 2736, 256), (1024, 1024, 64))
"""(in_features, out_features, rank) of 130M to 350M models."""
_DROPOUT = 0.1  # the published rate of ReLoRA
_WARM = 2


class Clock(Protocol):
    """Moments of a device."""

    device: torch.device

    def now(self) -> Any: ...

    def between(self, first: Any, last: Any) -> float:
        """Milliseconds."""
        ...


@dataclass(frozen=True)
class Beside:
    """Medians in ms, and how many times faster ours is, turn by turn."""

    method: str
    shape: tuple[int, int, int]
    dropout: float
    ours_ms: float
    theirs_ms: float
    ratio: float


def compare(
    trees: Path, tokens: int, repeat: int, dtype: torch.dtype, clock: Clock
) -> list[Beside]:
    """Time every method whose authors' tree is there.

    Args:
        trees: directory of their repositories.
        tokens: of one micro-batch.
        repeat: timed turns.
        dtype: of weights and activations.
        clock: of the device that computes.

    Raises:
        ConfigError: there is no tree, or a package that one needs is missing.
        AssertionError: theirs and ours do not compute the same.
    """
    found = []
    for method, make in find_authors(trees).items():
        for shape in SHAPES:
            for dropout in (0.0, _DROPOUT) if method == "relora" else (0.0,):
                layer = _layer(method, shape).to(clock.device, dtype)
                theirs = make(layer, dropout).to(clock.device, dtype)
                theirs.train()  # theirs need not return anything
                if not dropout:
                    _check_same(layer, theirs, tokens)
                times = list(_turns(layer, theirs, tokens, repeat, clock))
                ours_ms, theirs_ms = (statistics.median(each) for each in zip(*times, strict=True))
                ratio = statistics.median(b / a for a, b in times)
                found.append(Beside(method, shape, dropout, ours_ms, theirs_ms, ratio))
    return found


def table(rows: list[Beside]) -> list[str]:
    """The figures as a Markdown table."""
    lines = [
        "| method | n, m, r | dropout | ours ms | theirs ms | times faster |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        shape = ", ".join(map(str, row.shape))
        times = f"{row.ours_ms:.1f} | {row.theirs_ms:.1f} | {row.ratio:.3f}"
        lines.append(f"| {row.method} | {shape} | {row.dropout:g} | {times} |")
    return lines


def _layer(method: str, shape: tuple[int, int, int]) -> Projection:
    """Ours, with random weights."""
    n, m, rank = shape
    more: dict[str, dict[str, object]] = {
        "relora": {"merge_every": 1000, "restart_warmup_steps": 1},
        "sltrain": {"scale": 1.0, "sparsity": 0.03},
    }
    described = {
        "output_dir": "unused",
        "model": "unused",
        "deepspeed": "unused",
        "method": {"name": method, "rank": rank, **more.get(method, {})},
        "train": {"steps": 1, "seq_length": 1, "micro_batch_size": 1, "global_batch_size": 1},
    }
    config = RunConfig.model_validate_json(json.dumps(described))
    chosen = plan_phases(config)[-1].method
    layer = chosen.linear(LinearSpec("projection", n, m, bias=False, style="column"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        chosen.initialize(layer, torch.randn(m, n, generator=draw) / n**0.5)
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_(noise * 0.1 / rank**0.5)
    return layer


def _turn(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    out = layer(x)
    out.backward(grad)
    return out


def _check_same(layer: Projection, theirs: nn.Module, tokens: int) -> None:
    """Refuse to time what does not compute the same."""
    inputs = _inputs(layer, tokens)
    outs, grads = [], []
    for each in (layer, theirs):
        x = inputs[0].clone().requires_grad_()
        outs.append(_turn(each, x, inputs[1]).detach().float())
        grads.append(x.grad)
    each = zip((outs, grads), ("outputs", "gradients"), strict=True)
    for (ours, other), what in each:
        assert ours is not None
        assert other is not None
        error = float((ours.float() - other.float()).norm() / ours.float().norm())
        assert error < (1e-4 if inputs[0].dtype == torch.float32 else 3e-2), f"{what}: {error}"
    for module in (layer, theirs):
        module.zero_grad()


def _inputs(layer: Projection, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (1, T, n) and dy (1, T, m)."""
    like = next(layer.parameters())
    draw = torch.Generator(like.device).manual_seed(2)
    sizes = layer.spec.in_features, layer.spec.out_features
    x, grad = (
        torch.randn(1, tokens, size, generator=draw, device=like.device, dtype=like.dtype)
        for size in sizes
    )
    return x, grad


def _turns(
    layer: Projection, theirs: nn.Module, tokens: int, repeat: int, clock: Clock
) -> Iterator[tuple[float, float]]:
    """Milliseconds of ours and theirs, in turns."""
    x, grad = _inputs(layer, tokens)
    x.requires_grad_()
    like = next(layer.parameters())
    update = UpdateSize(tokens, dtype=like.dtype, device=like.device.type)
    modules: list[Any] = [layer, theirs]
    for turn in range(_WARM + repeat):
        times = []
        for module in modules:
            x.grad = None
            module.zero_grad()
            first = clock.now()
            with weights_stay([layer] if module is layer else [], update):
                _turn(module, x, grad)
            times.append(clock.between(first, clock.now()))
        if turn >= _WARM:
            yield times[0], times[1]
