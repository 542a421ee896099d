"""Shares of gradients and calls within a copy of the model; ranks check it in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from relora_ds.accounting.recorder import Traffic
from relora_ds.accounting.tp_traffic import GroupWork, shares_by_rank, tensor_volumes
from relora_ds.config.load import load_run_config
from relora_ds.methods.registry import plan_phases
from relora_ds.model.llama import Llama
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.parallel.tensor import TensorParallel
from relora_ds.parallel.zero import ZeroSettings
from relora_ds.planning.memory_report import largest_part

ROOT = Path(__file__).parents[3]
COPIES = 3


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> tuple[Llama, list[list[nn.Parameter]]]:
    monkeypatch.chdir(ROOT)
    loaded = load_run_config("configs/run/quickstart.yaml", ("method.rank=7",))
    method = plan_phases(loaded.config)[-1].method
    tp = TensorParallel(size=2)
    model = largest_part(loaded.architecture, method, loaded.config.train, tp)
    return model, [list(group.parameters) for group in method.parameter_groups(model)]


def partial(model: Llama) -> dict[str, nn.Parameter]:
    """Columns sum the gradient of A, rows that of B."""
    rows = ("o_proj.lora_B", "down_proj.lora_B")
    columns = tuple(f"{n}_proj.lora_A" for n in ("q", "k", "v", "gate", "up"))
    return {n: p for n, p in model.named_parameters() if n.endswith(rows + columns)}


@pytest.mark.parametrize("stage", range(4))
def test_shares_of_a_rank_are_what_its_slices_hold(
    part: tuple[Llama, list[list[nn.Parameter]]], stage: int
) -> None:
    model, groups = part
    shared = set(partial(model).values())
    marks = [[p in shared for p in group for _ in range(p.numel())] for group in groups]
    if stage == 0:
        expected = [sum(map(sum, marks))] * COPIES
    elif stage == 3:
        sizes = [p.numel() for p in shared]
        slices = [-(-n // COPIES) for n in sizes]
        whole = zip(sizes, slices, strict=True)
        expected = [sum(slices), sum(slices), sum(n - 2 * part for n, part in whole)]
    else:
        expected = [0] * COPIES
        for group in marks:
            share = -(-len(group) // (2 * COPIES)) * 2
            for rank in range(COPIES):
                expected[rank] += sum(group[rank * share : (rank + 1) * share])
    found = shares_by_rank(model, groups, stage, COPIES)
    assert found == expected
    assert sum(found) == sum(p.numel() for p in shared) * (COPIES if stage == 0 else 1)


@pytest.mark.parametrize(("stage", "flags"), [(0, 1), (1, 1), (2, 1), (3, 0)])
def test_only_stage_3_does_not_exchange_the_overflow_flag(
    part: tuple[Llama, list[list[nn.Parameter]]], stage: int, flags: int
) -> None:
    model, groups = part
    zero = ZeroSettings(stage, torch.bfloat16, accumulation=5, clip=1.0)
    found = tensor_volumes(
        model, zero, GroupWork(2, UpdateSize(16, 5, torch.bfloat16), 100, len(groups))
    )
    flag = found.get(Traffic("all_reduce", "tp", 2, "uint8", "step"))
    assert (0 if flag is None else flag.payload) == flags
    forward = found[Traffic("all_reduce", "tp", 2, "bfloat16", "forward")]
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    assert forward.calls == 5 * (2 * layers + 1)
    assert forward.payload == forward.calls * 2 * 16 * width
