"""Products of either library are the same products, and gradients go where they are wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relora_ds.numerics import products
from relora_ds.numerics.products import linear, matmul, offer_place, scaled

SHAPES = [(1, 1, 1), (3, 5, 7), (64, 33, 20), (20, 64, 90), (300, 7, 1), (1, 300, 7), (7, 1, 9)]
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["torch", "oneDNN"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_ONEDNN_FROM", 1)
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    return request.param


def _layouts(rows: int, cols: int) -> dict[str, torch.Tensor]:
    return {
        "rows": torch.randn(rows, cols),
        "columns": torch.randn(cols, rows).t(),
        "part": torch.randn(rows, cols + 3)[:, 1 : 1 + cols],
        "odd": torch.randn(rows * cols + 1)[1:].view(rows, cols),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_of_any_layout(onednn: bool, shape: tuple[int, int, int]) -> None:
    rows, inner, cols = shape
    for left in _layouts(rows, inner).values():
        for right in _layouts(inner, cols).values():
            found = matmul(left, right)
            assert found.is_contiguous()
            torch.testing.assert_close(
                found.double(), left.double() @ right.double(), rtol=1e-5, atol=2e-5
            )


def test_a_projection_and_its_gradients(onednn: bool) -> None:
    x, weight = torch.randn(2, 9, 6, requires_grad=True), nn.Parameter(torch.randn(4, 6))
    grad = torch.randn(2, 9, 4)
    found = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    wanted = torch.autograd.grad(nn.functional.linear(x, weight), (x, weight), grad)
    torch.testing.assert_close(found, wanted)


@needs_onednn
def test_which_library_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN gets large products in fp32 where it is the faster one, and nothing else."""
    calls: list[torch.dtype] = []

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(x.dtype)
        return x @ weight.t()

    monkeypatch.setattr(products, "_onednn", noted)
    monkeypatch.setattr(products, "_ONEDNN_FROM", 1000)
    for preferred in (False, True):
        monkeypatch.setattr(products, "prefers_onednn", lambda preferred=preferred: preferred)
        for size in (9, 10):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                matmul(torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype))
    assert calls == [torch.float32]


def test_a_gradient_is_written_where_it_is_read(onednn: bool) -> None:
    """The first one of an update into its place, without a copy; the next one is added there."""
    weight = nn.Parameter(torch.randn(8, 6))
    place = torch.full((48,), torch.nan).view(8, 6)
    offer_place(weight, lambda: place.view(8, 6) if weight.grad is None else None)
    expected = torch.zeros(8, 6)
    for _ in range(2):
        x, grad = torch.randn(5, 6), torch.randn(5, 8)
        linear(x, weight).backward(grad)
        expected += grad.t() @ x
        assert weight.grad is not None
        assert weight.grad.data_ptr() == place.data_ptr()
        torch.testing.assert_close(place, expected)
    offer_place(weight, None)
    weight.grad = None
    linear(torch.randn(5, 6), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() != place.data_ptr()


def test_a_scaled_gradient() -> None:
    product, place = torch.ones(3, 2).t(), torch.zeros(2, 3)
    assert scaled(product, 0.5, lambda: place) is place
    assert place.eq(0.5).all()
    assert product.eq(1.0).all()
    assert scaled(product, 0.5).eq(0.5).all()
