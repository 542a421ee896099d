"""One run in every formulation: whichever way projections compute, it stays the same run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.utils import counters

from relora_ds.config.schema import RunConfig
from relora_ds.engine import distributed
from relora_ds.methods.formulation.composed import Composition
from relora_ds.methods.interface import projection_layers
from relora_ds.model.llama import Llama
from relora_ds.model.mlp import MLP
from relora_ds.parallel.linear import Projection
from relora_ds.parallel.topology import Topology, share_models
from tests.harness.build import CUT, TINY, Training, batches, run_config
from tests.harness.resume import load, save

STEPS, BREAK = 14, 7
FORMULATIONS = ("split", "layer", "step")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4, "alpha": 6, "trainable_scaling": True},
    "relora": {
        "name": "relora",
        "rank": 4,
        "alpha": 6,
        "merge_every": 5,
        "restart_warmup_steps": 2,
    },
    "switchlora": {"name": "switchlora", "rank": 6, "interval": 4, "freeze_steps": 2},
    "sltrain": {"name": "sltrain", "rank": 4, "alpha": 6, "sparsity": 0.1},
}
"""Those whose projections have a choice."""
EVERY: dict[str, dict[str, Any]] = {"full": {"name": "full"}, **METHODS}
PADDED: dict[str, dict[str, Any]] = {
    **EVERY,
    "low_rank": {"name": "low_rank", "rank": 4},
    "galore": {"name": "galore", "rank": 4, "update_every": 5},
}
WIDTHS = {("off", 1): [41], ("on", 1): [48], ("off", 2): [21, 20], ("on", 2): [24, 20]}
"""Columns of activations in fp32 within an MLP of 41, by rank of the tensor-parallel group."""
RATES = {"dense": 4e-3, "adapter": 6e-3}


def described(method: str, formulation: str, tensor: int, plan: str) -> RunConfig:
    """Fourteen updates of two or four micro-batches each."""
    return run_config(
        PADDED[method],
        train={
            "formulation": formulation,
            "activation_checkpointing": plan == "recomputed",
            "per_layer_update": plan == "per_layer",
            "pad_mlp": "on" if plan == "padded" else "auto",
        },
        # a small eps turns rounding into updates where a gradient is nearly zero
        optimizer={"eps": 1e-3, "clip": 0.0 if plan == "per_layer" else 0.3},
        parallel={"tensor": tensor, "low_rank_plan": "fold" if plan == "fold" else "act"},
    )


def losses(
    topology: Topology, cells: Sequence[tuple[str, int, str]], tensor: int = 1
) -> dict[str, list[float]]:
    """Losses by method, ZeRO stage, plan and formulation.

    Args:
        topology: this rank's place.
        cells: method, ZeRO stage, and what is special: `act`, `fold`, `recomputed`, `per_layer`.
        tensor: ranks that share a copy of the model.
    """
    found = {}
    for method, stage, plan in cells:
        for formulation in FORMULATIONS:
            config = described(method, formulation, tensor, plan)
            run = Training(config, share_models(topology, config), {"stage": stage})
            found[f"{method}/{stage}/{plan}/{formulation}"] = _losses(run, formulation == "step")
    return found


def padded_losses(
    topology: Topology, cells: Sequence[tuple[str, int, str, str]], tensor: int = 1
) -> dict[str, list[list[float]]]:
    """Losses of a model with an MLP of 41 columns by method, ZeRO stage, plan and formulation: as
    it is, and computed at padded widths.

    Args:
        topology: this rank's place.
        cells: method, ZeRO stage, what is special as in `losses`, and formulation.
        tensor: ranks that share a copy of the model.
    """
    found = {}
    for method, stage, plan, formulation in cells:
        both = []
        for pads in ("off", "on"):
            config = described(method, formulation, tensor, plan)
            train = config.train.model_copy(update={"pad_mlp": pads})
            config = config.model_copy(update={"train": train})
            run = Training(config, share_models(topology, config), {"stage": stage}, CUT)
            widths: set[int] = set()
            look = partial(_note_width, widths)
            for mlp in (each for each in run.engine.model.modules() if isinstance(each, MLP)):
                mlp.down_proj.register_forward_pre_hook(look)
            tokens = enumerate(batches(STEPS))
            both.append([run.update(step, each, RATES).loss for step, each in tokens])
            # passes that choose a basis are no updates
            also = WIDTHS["off", tensor] if method == "galore" else []
            rank = run.topology.tp.rank
            assert widths == {WIDTHS[pads, tensor][rank], *also[rank : rank + 1]}
            run.check_replicas()
            run.destroy()
        found[f"{method}/{stage}/{plan}/{formulation}"] = both
    return found


def _note_width(widths: set[int], _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    widths.add(inputs[0].shape[-1])


def compiled_losses(
    topology: Topology, cells: Sequence[tuple[str, int, str]], tensor: int = 1
) -> dict[str, list[list[float]]]:
    """Losses by method, ZeRO stage and plan: with plain layers, and with compiled ones.

    Args:
        topology: this rank's place.
        cells: as in `losses`; `padded` has MLPs of 41 columns, computed at 48.
        tensor: ranks that share a copy of the model.
    """
    found = {}
    with compiler_at_work():
        for method, stage, plan in cells:
            both = []
            for compiled in (False, True):
                config = described(method, "auto", tensor, plan)
                model = CUT if plan == "padded" else TINY
                run = Training(config, share_models(topology, config), {"stage": stage}, model)
                if compiled:
                    cast(Llama, run.engine.model).compile_layers()
                tokens = enumerate(batches(STEPS))
                both.append([run.update(step, each, RATES).loss for step, each in tokens])
                run.check_replicas()
                run.destroy()
            found[f"{method}/{stage}/{plan}"] = both
    return found


@contextmanager
def compiler_at_work() -> Iterator[None]:
    """Take back what keeps torch's compiler off in tests; what is inside must have used it."""
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    before = counters["stats"]["unique_graphs"]
    yield
    assert counters["stats"]["unique_graphs"] > before
    torch.compiler.reset()


def _losses(run: Training, keeps: bool) -> list[float]:
    """Losses of all updates, in which composed weights were kept or were not."""
    layers = list(projection_layers(run.engine.model).values())
    kept: list[bool] = []

    def look(module: nn.Module, *_: object) -> None:
        assert isinstance(module, Projection)
        kept.append(bool(module.held()))

    hooks = [layer.register_forward_hook(look) for layer in layers]
    with _counted() as compositions:
        updates = [run.update(step, each, RATES) for step, each in enumerate(batches(STEPS))]
    for hook in hooks:
        hook.remove()
    assert set(kept) == {keeps}
    if keeps:  # a merge or a switch is no reason to compose again
        assert len(compositions) == len(layers) * STEPS
    assert not any(layer.held() for layer in layers), "one outlived its update"
    run.check_replicas()
    run.destroy()
    return [update.loss for update in updates]


@contextmanager
def _counted() -> Iterator[list[str]]:
    """One entry per dense weight that is composed."""
    found: list[str] = []
    with ExitStack() as stack:
        for kind in Composition.__subclasses__():
            compose = kind.compose

            def noted(self: Any, *parts: torch.Tensor, _compose: Any = compose) -> torch.Tensor:
                found.append(type(self).__name__)
                return _compose(self, *parts)

            stack.enter_context(patch.object(kind, "compose", noted))
        yield found


def resumed(
    topology: Topology, method: str, formulation: str, stage: int, compiled: bool = False
) -> list[list[float]]:
    """Losses of a run after its seventh update: unbroken, and resumed there."""
    config, tokens = described(method, formulation, 1, "act"), batches(STEPS)
    directory = distributed.broadcast_object(tempfile.mkdtemp())

    def train(run: Training, first: int, last: int) -> list[float]:
        if compiled:
            cast(Llama, run.engine.model).compile_layers()
        return [run.update(step, tokens[step], RATES).loss for step in range(first, last)]

    with compiler_at_work() if compiled else nullcontext():
        run = Training(config, topology, {"stage": stage})
        train(run, 0, BREAK)
        saved = save(run, Path(directory))
        unbroken = train(run, BREAK, STEPS)
        run.destroy()
        again = Training(config, topology, {"stage": stage})
        load(again, saved)
        found = train(again, BREAK, STEPS)
        again.destroy()
    return [unbroken, found]
