"""Every method computes the same whichever library multiplies its matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relora_ds.methods.build import build_model
from relora_ds.methods.registry import METHODS, plan_phases
from relora_ds.model.init import InitialWeights
from relora_ds.numerics import products
from tests.harness.build import TINY, batches, run_config

SETTINGS: dict[str, dict[str, Any]] = {
    "relora": {"merge_every": 10, "restart_warmup_steps": 1},
    "sltrain": {"scale": 0.5, "sparsity": 0.1},
}


def _gradients(method: str) -> dict[str, torch.Tensor]:
    """The loss of one batch, and gradients of all that is trained, in fp32."""
    rank = {} if method == "full" else {"rank": 4}
    config = run_config({"name": method, **rank, **SETTINGS.get(method, {})})
    chosen, train = plan_phases(config)[-1].method, config.train
    weights, device = InitialWeights(TINY, train.seed), torch.device("cpu")
    model = build_model(TINY, chosen, train, weights, device)
    loss = model(batches(1)[0])
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("method", METHODS)
def test_either_library_gives_the_same_gradients(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, multiply = [], products._onednn

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(weight.shape)
        return multiply(x, weight)

    monkeypatch.setattr(products, "_onednn", noted)
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)
    expected = _gradients(method)
    assert not calls
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "_ONEDNN_FROM", 1)
    found = _gradients(method)
    assert len(calls) > 10
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
