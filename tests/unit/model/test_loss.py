"""The chunked loss equals torch's on full logits, and never makes full logits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from relora_ds.model import loss as loss_module
from relora_ds.model.loss import IGNORE, chunk_rows, linear_cross_entropy
from tests.harness.device_costs import DEVICE, SimulatedDevice

TOKENS, WIDTH, VOCAB, ROWS = 50, 12, 37, 16


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def inputs(dtype=torch.float32, ignored=0):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[:ignored] = IGNORE
    return hidden, weight, targets


def full(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


@pytest.mark.parametrize("rows", [1, ROWS, TOKENS, 1000])
@pytest.mark.parametrize("ignored", [0, 20, TOKENS])
def test_equals_cross_entropy_on_full_logits(rows, ignored):
    hidden, weight, targets = inputs(ignored=ignored)
    loss = linear_cross_entropy(hidden, weight, targets, TOKENS, rows)
    gradients = torch.autograd.grad(loss * 3, (hidden, weight))
    expected = full(hidden, weight, targets) / TOKENS
    expected_gradients = torch.autograd.grad(expected * 3, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, TOKENS, rows), loss)


def test_gradcheck_in_double():
    hidden, weight, targets = inputs(torch.float64, ignored=5)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, 7, ROWS), (hidden, weight)
    )


def test_backward_may_run_twice():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, 1, ROWS)
    first = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bfloat16_sums_the_weight_gradient_in_fp32():
    hidden, weight, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, TOKENS, 1)
    gradients = torch.autograd.grad(loss / 3, (hidden, weight))
    wide = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    expected = full(*wide, targets) / TOKENS
    expected_gradients = torch.autograd.grad(expected / 3, wide)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == torch.bfloat16
        # 50 chunks summed in bf16 would be off by several percent
        assert (got.float() - want).norm() < 0.01 * want.norm()


def test_a_gpu_adds_the_weight_gradient_of_a_chunk_in_one_pass(monkeypatch):
    hidden = torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(VOCAB, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(TOKENS, dtype=torch.int64, device=DEVICE)
    counts = []
    for adds in (False, True):
        weight.grad = None
        monkeypatch.setattr(loss_module, "_adds_widely", lambda device, dtype, adds=adds: adds)
        with SimulatedDevice() as device:
            linear_cross_entropy(hidden, weight, targets, rows=ROWS).backward()
        assert not device.costs.waits
        counts.append(Counter(device.costs.launches))
    chunks = -(-TOKENS // ROWS)
    assert counts[0]["add_"] == counts[1]["addmm"] == chunks
    assert counts[0]["addmm"] == counts[1]["add_"] == 0
    assert counts[0].total() - counts[1].total() == chunks


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_no_gradient_for_what_is_frozen(frozen):
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(full(hidden, weight, targets), (hidden, weight))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, targets, 1, ROWS)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    got, absent = (hidden, weight) if frozen == "weight" else (weight, hidden)
    assert absent.grad is None
    want = expected[0] if frozen == "weight" else expected[1]
    torch.testing.assert_close(got.grad, want, rtol=1e-5, atol=1e-5)


def test_no_tokens():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_full_logits_never_exist(dtype, training):
    generator = torch.Generator().manual_seed(4)
    tokens, width, vocab = 640, 8, 128_000
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_(training)
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_(training)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    with LargestTensor() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, tokens)
        if training:
            loss.backward()
    assert largest.elements == chunk_rows(vocab) * vocab
    assert largest.elements * 10 == tokens * vocab


@pytest.mark.parametrize("vocab", [97, 32_000, 32_100, 128_256, 50_000_000])
@pytest.mark.parametrize(("device", "mib"), [("cpu", 32), ("cuda", 256)])
def test_a_chunk_fits(vocab, device, mib):
    rows = chunk_rows(vocab, device)
    assert rows == 1 or 4 * rows * vocab <= mib * 2**20
    assert 4 * (rows + 64) * vocab > mib * 2**20, "there is room for more"
    assert rows % 64 == 0 or rows < 64


def test_second_derivative_is_refused():
    hidden, weight, targets = inputs(torch.float64)
    (first,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets) ** 2, hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
