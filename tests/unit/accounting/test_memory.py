"""The closed form of a step's memory at sizes that no test machine holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from relora_ds.accounting.memory.model import StoragePlan, expected_memory
from relora_ds.config.load import load_run_config
from relora_ds.methods.build import meta_model
from relora_ds.methods.registry import plan_phases
from relora_ds.parallel.footprint import UpdateSize
from relora_ds.planning.memory_report import storage_plan

ROOT = Path(__file__).parents[3]
PURE_BF16 = StoragePlan(working=2, master=0, moment=2)


def states(run: str, plan: StoragePlan | None, *overrides: str) -> int:
    """Weights, indices, gradients and optimizer states of a shipped run, as it stores them itself
    or by another plan."""
    loaded = load_run_config(f"configs/run/{run}.yaml", overrides)
    plan = plan or storage_plan(loaded.config, 0, 1, torch.device("cuda"))
    method = plan_phases(loaded.config)[-1].method
    model = meta_model(loaded.architecture, method, loaded.config.train)
    groups = [group.parameters for group in method.parameter_groups(model)]
    found = expected_memory(model, plan, groups)
    assert found.transient is not None
    return found.total - found.transient


def test_sltrain_7b(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    small = states("llama_7b_sltrain_single_gpu", None)
    masters = states("llama_7b_sltrain_single_gpu", None, "train.master_weights=true")
    full = states(
        "llama_60m_full", PURE_BF16, "model=configs/model/llama_7b.json", "train.seq_length=256"
    )
    # four bf16 copies of 6.738 B parameters
    assert full == pytest.approx(53.91e9, rel=1e-3)
    assert small == pytest.approx(13.59e9, rel=1e-3)
    assert small <= 14.3e9
    assert small <= (1 - 0.73) * full
    # four bytes of every trained weight and of the largest gradient
    assert masters - small == 4 * (3_144_735_808 + 131_072_000)


@pytest.mark.parametrize(
    ("run", "published"),
    [
        # weights and moments in bf16 with 8-byte indices
        ("llama_60m_sltrain", 0.267),
        ("llama_130m_sltrain", 0.600),
        ("llama_350m_sltrain", 1.238),
        ("llama_1b_sltrain", 4.163),
    ],
)
def test_published_estimates(run: str, published: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load_run_config(f"configs/run/{run}.yaml")
    method = plan_phases(loaded.config)[-1].method
    model = meta_model(loaded.architecture, method, loaded.config.train)
    groups = [group.parameters for group in method.parameter_groups(model)]
    found = expected_memory(model, PURE_BF16, groups)
    nnz = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".values"))
    theirs = found.weights + found.states + 8 * nnz
    assert theirs / 1e9 == pytest.approx(published, abs=1e-3)
    assert found.indices < 2.2 * nnz + 4 * 10**6


def test_stages_divide_what_they_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load_run_config("configs/run/llama_60m_relora.yaml")
    method = plan_phases(loaded.config)[-1].method
    model = meta_model(loaded.architecture, method, loaded.config.train)
    groups = [group.parameters for group in method.parameter_groups(model)]
    found = [
        expected_memory(
            model, StoragePlan(2, 4, 4, stage=stage, dp_size=8), groups, update=UpdateSize(1024)
        )
        for stage in (0, 1, 3)
    ]
    assert found[0].states == 12 * 42_770_944 == 8 * found[1].states
    assert found[0].weights == found[1].weights == 8 * found[2].weights
    assert found[0].activations == found[2].activations
