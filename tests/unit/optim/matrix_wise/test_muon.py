"""The polar factor by matrix products, and Muon against torch's own."""

from __future__ import annotations

import pytest
import torch

from relora_ds.optim.matrix import MatrixSlice, MatrixUpdate, OfWhole
from relora_ds.optim.matrix_wise.muon import Muon, ShapeFactor
from relora_ds.optim.matrix_wise.polar import KELLER, POLAR_EXPRESS, polar
from relora_ds.optim.rectangles import rectangles

SHAPES = [(24, 24), (40, 16), (16, 40), (1, 7), (7, 1)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_equal_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = draw(3, *shape)
    found = polar(matrices, POLAR_EXPRESS)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.allclose(torch.linalg.svdvals(found), torch.ones(()).double(), atol=0.02)
    assert torch.allclose(found, left @ right, atol=0.05)


def test_small_singular_values_are_raised() -> None:
    left, right = torch.linalg.qr(draw(12, 12))[0], torch.linalg.qr(draw(12, 12).T)[0]
    values = torch.logspace(0, -3, 12, dtype=torch.float64)
    matrix = (left * values) @ right
    found = torch.linalg.svdvals(polar(matrix.unsqueeze(0), POLAR_EXPRESS))
    assert found.min() > 0.9
    assert found.max() < 1.1
    # five equal steps leave the smallest behind
    assert torch.linalg.svdvals(polar(matrix.unsqueeze(0), KELLER)).min() < 0.9


def test_a_batch_is_its_matrices_one_by_one_and_zeros_stay() -> None:
    matrices = torch.stack([draw(6, 4), torch.zeros(6, 4).double(), 1e-3 * draw(6, 4)])
    found = polar(matrices, KELLER)
    assert not found[1].any()
    for number in (0, 2):
        alone = polar(matrices[number : number + 1], KELLER)[0]
        assert torch.allclose(found[number], alone, atol=1e-12)
    assert torch.allclose(found[0], found[2], atol=1e-9), "scale does not matter"


def update(rule: Muon, weight: torch.Tensor, grad: torch.Tensor, matrix: MatrixSlice) -> None:
    """One update of a matrix that one process holds whole."""
    steps = rule.update([MatrixUpdate(matrix, weight.view(-1), grad.view(-1), 1, 0.02, 0.1)])
    request = next(steps)
    assert isinstance(request, OfWhole)
    ((values,),) = request.values
    (whole,) = request.function(values.view(1, *weight.shape))
    with pytest.raises(StopIteration):
        steps.send((whole.reshape(-1),))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("factor", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_it_is_torchs_muon_but_for_precision(
    shape: tuple[int, int], factor: ShapeFactor, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch computes the polar factor on a copy in bf16; here on a copy
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    weight = torch.nn.Parameter(draw(*shape).float())
    ours = weight.detach().clone()
    theirs = torch.optim.Muon(
        [weight], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=factor
    )
    rule = Muon(nesterov=nesterov, coefficients=KELLER, shape_factor=factor)
    pieces = tuple(rectangles(0, ours.numel(), shape[1]))
    state = {"momentum": torch.zeros(ours.numel())}
    matrix = MatrixSlice("w", ours.shape, pieces, True, state)
    for step in range(40):
        grad = draw(*shape).float() * (1 + step % 3) + 0.1 * step
        weight.grad = grad.clone()
        theirs.step()
        update(rule, ours, grad, matrix)
    assert torch.allclose(ours, weight.detach(), atol=1e-5, rtol=1e-5)


def test_factors_of_shapes() -> None:
    tall, wide = torch.Size((32, 8)), torch.Size((8, 32))
    assert Muon().factor(tall) == 2
    assert Muon().factor(wide) == 1
    assert Muon(shape_factor="spectral").factor(wide) == 0.5
    assert Muon(shape_factor="match_rms_adamw").factor(wide) == pytest.approx(0.2 * 32**0.5)
    assert Muon().state(tall).keys() == {"momentum"}
