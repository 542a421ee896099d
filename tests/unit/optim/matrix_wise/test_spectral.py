"""Spectral updates of pairs against the polar factor of the whole product, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from relora_ds.methods.low_rank import split_spectrum
from relora_ds.optim.matrix import MatrixSlice, MatrixUpdate, OfWhole
from relora_ds.optim.matrix_wise.spectral import SpectralPair, largest_eigenvalue
from relora_ds.optim.rectangles import rectangles

SHAPES = [(12, 9, 3), (9, 12, 4), (7, 7, 1), (30, 8, 6)]
"""m, n, r; the last one with 2 r > n."""
Whole = dict[str, torch.Tensor]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition, of the singular values that are no rounding."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-10 * s[0]
    return u[:, kept] @ vh[kept]


def dense_step(a: torch.Tensor, na: torch.Tensor, b: torch.Tensor, nb: torch.Tensor) -> Whole:
    """The update by its formula, on the product's own change (m, n)."""
    (m, n) = b.shape[0], a.shape[1]
    direction = polar(nb @ a + b @ na)
    factor = 0.5 * math.sqrt(max(1.0, m / n))
    return {"lora_A": factor * b.T @ direction, "lora_B": factor * direction @ a.T}


def directions(*values: torch.Tensor) -> list[torch.Tensor]:
    """Of one pair: A, N_A, B, N_B."""
    return [found[0] for found in SpectralPair().directions(*(each[None] for each in values))]


@pytest.mark.parametrize("zero", ["nothing", "B and A's momentum", "A", "momenta"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polar_step_of_the_product(shape: tuple[int, int, int], zero: str) -> None:
    m, n, r = shape
    a, na, b, nb = draw(1, r, n), 1e-4 * draw(2, r, n), 30 * draw(3, m, r), draw(4, m, r)
    if zero == "B and A's momentum":
        b, na = torch.zeros_like(b), torch.zeros_like(na)
    if zero == "A":
        a = torch.zeros_like(a)
    if zero == "momenta":
        na, nb = torch.zeros_like(na), torch.zeros_like(nb)
    expected = dense_step(a, na, b, nb)
    found_a, found_b = SpectralPair().directions(a[None], na[None], b[None], nb[None])
    for found, name in ((found_a, "lora_A"), (found_b, "lora_B")):
        scale = expected[name].abs().max().clamp(min=1.0)
        assert (found[0] - expected[name]).abs().max() <= 1e-6 * scale, name


@pytest.mark.parametrize("shape", [*SHAPES, (60, 50, 24)])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e12])
def test_momenta_that_leave_the_product_as_it_is_move_nothing(
    shape: tuple[int, int, int], size: float
) -> None:
    """N_B = B X and N_A = -X A change the factors and not B A: rounding is no direction."""
    m, n, r = shape
    a, b, x = draw(1, r, n), draw(2, m, r), size * draw(3, r, r)
    for rest in (0.0, 1e-12):
        na, nb = -x @ a, b @ x + rest * size * draw(4, m, r)
        for found, full in zip(directions(a, na, b, nb), directions(a, a, b, b), strict=True):
            assert found.norm() <= 1e-3 * full.norm()


@pytest.mark.parametrize(
    ("rest", "share"), [(1e-1, 1e-6), (1e-2, 1e-5), (1e-3, 1e-4), (1e-4, 1e-2)]
)
def test_what_remains_of_momenta_that_nearly_cancel_is_a_direction(
    rest: float, share: float
) -> None:
    a, b, x = draw(1, 6, 20), draw(2, 24, 6), draw(3, 6, 6)
    na, nb = -x @ a, b @ x + rest * draw(4, 24, 6)
    expected = dense_step(a, na, b, nb)
    for value, name in zip(directions(a, na, b, nb), ("lora_A", "lora_B"), strict=True):
        assert (value - expected[name]).abs().max() <= share * expected[name].abs().max(), name


@pytest.mark.parametrize("spread", [1e1, 1e2, 1e3])
@pytest.mark.parametrize("which", ["factors", "momenta"])
def test_it_is_exact_where_columns_are_nearly_dependent(which: str, spread: float) -> None:
    m, n, r = 24, 20, 6
    shapes = {"a": (r, n), "na": (r, n), "b": (m, r), "nb": (m, r)}
    values = {name: draw(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    for name in ("a", "b") if which == "factors" else ("na", "nb"):
        u, s, vh = torch.linalg.svd(values[name], full_matrices=False)
        values[name] = (u * torch.logspace(0, -math.log10(spread), len(s)).double()) @ vh
    expected = dense_step(**values)
    found = SpectralPair().directions(*(values[name][None] for name in shapes))
    for value, name in zip(found, ("lora_A", "lora_B"), strict=True):
        assert (value[0] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_equal_columns_are_no_division_by_zero() -> None:
    a, b = draw(1, 4, 9), draw(2, 12, 4)
    a[1], b[:, 2] = a[0], b[:, 3]
    na, nb = a.clone(), b.clone()
    expected = dense_step(a, na, b, nb)
    found = SpectralPair().directions(a[None], na[None], b[None], nb[None])
    for value, name in zip(found, ("lora_A", "lora_B"), strict=True):
        assert (value[0] - expected[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("shape", [(24, 20), (20, 40)])
def test_factors_that_start_balanced_stay_so(shape: tuple[int, int]) -> None:
    rank = 6
    b, a = (factor.double() for factor in split_spectrum(draw(1, *shape), rank))
    momenta = torch.zeros_like(a), torch.zeros_like(b)
    start = b @ a
    for step in range(40):
        gradient = draw(100 + step, *shape)  # of the product
        for momentum, grad in zip(momenta, (b.T @ gradient, gradient @ a.T), strict=True):
            momentum.lerp_(grad, 0.05)
        da, db = SpectralPair().directions(a[None], momenta[0][None], b[None], momenta[1][None])
        a, b = a - 0.02 * da[0], b - 0.02 * db[0]
    assert (b @ a - start).norm() > 0.1 * start.norm()
    assert (b.T @ b - a @ a.T).norm() <= 1e-6 * (a @ a.T).norm()


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_normalized_step_moves_the_weight_by_the_learning_rate(size: float, scale: float) -> None:
    a, na, b, nb = (size * draw(seed, *s) for seed, s in enumerate([(4, 9)] * 2 + [(12, 4)] * 2))
    rule = SpectralPair(normalized=True, scale=scale)
    da, db = (each[0] for each in rule.directions(a[None], na[None], b[None], nb[None]))
    moved = scale * torch.linalg.matrix_norm(b @ da + db @ a, 2) / math.sqrt(12 / 9)
    assert 0.4 <= moved <= 1.05


def test_a_batch_is_its_pairs_one_by_one() -> None:
    stacks = [
        torch.stack([draw(10 * k + s, *shape) for k in range(3)])
        for s, shape in enumerate([(3, 9), (3, 9), (12, 3), (12, 3)])
    ]
    together = SpectralPair(normalized=True).directions(*stacks)
    for k in range(3):
        alone = SpectralPair(normalized=True).directions(*(stack[k : k + 1] for stack in stacks))
        for found, expected in zip(together, alone, strict=True):
            assert torch.allclose(found[k], expected[0], atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 40])
def test_the_bound_of_an_eigenvalue_is_tight(k: int) -> None:
    root = draw(5, k, 2 * k)
    gram = torch.stack([root @ root.T, 1e-30 * root @ root.T, torch.zeros(k, k).double()])
    found, exact = largest_eigenvalue(gram), torch.linalg.eigvalsh(gram)[:, -1]
    assert found[2] == 0
    for value, true in zip(found[:2].tolist(), exact[:2].tolist(), strict=True):
        assert true * (1 - 1e-9) <= value <= true * k ** (1 / 64) * (1 + 1e-9)


@pytest.mark.parametrize("nesterov", [True, False])
def test_forty_updates_in_fp32_follow_the_formula(nesterov: bool) -> None:
    m, n, r = 12, 9, 3
    names, lr, decay = ("lora_A", "lora_B"), 0.05, 0.1
    exact = {"lora_A": draw(1, r, n), "lora_B": torch.zeros(m, r).double()}
    momenta = {name: torch.zeros_like(value) for name, value in exact.items()}
    live = {name: value.float() for name, value in exact.items()}
    rule = SpectralPair(nesterov=nesterov)
    slices = {}
    for name, value in live.items():
        pieces = tuple(rectangles(0, value.numel(), value.shape[1]))
        state = {"momentum": torch.zeros(value.numel())}
        slices[name] = MatrixSlice(name, value.shape, pieces, True, state)
    for step in range(40):
        grads = {name: draw(100 + 2 * step + i, *exact[name].shape) for i, name in enumerate(names)}
        ahead = {}
        for name, grad in grads.items():
            momenta[name] = 0.95 * momenta[name] + 0.05 * grad
            ahead[name] = 0.05 * grad + 0.95 * momenta[name] if nesterov else momenta[name]
        moves = dense_step(exact["lora_A"], ahead["lora_A"], exact["lora_B"], ahead["lora_B"])
        for name in names:
            exact[name] = (1 - lr * decay) * exact[name] - lr * moves[name]
        steps = rule.update(
            [
                MatrixUpdate(
                    slices[name],
                    live[name].view(-1),
                    grads[name].float().view(-1),
                    step + 1,
                    lr,
                    decay,
                )
                for name in names
            ]
        )
        request = next(steps)
        assert isinstance(request, OfWhole)
        wholes = [
            value.view(1, *live[name].shape)
            for name, each in zip(names, request.values, strict=True)
            for value in each
        ]
        with pytest.raises(StopIteration):
            steps.send(tuple(each.reshape(-1) for each in request.function(*wholes)))
        for name in names:
            assert (live[name] - exact[name]).abs().max() <= 1e-5, (step, name)


def test_what_is_frozen_neither_moves_nor_decays() -> None:
    frozen = torch.tensor([False, True, False, True])
    start, direction = torch.tensor([1.0, -0.0, 3.0, 4.0]), torch.ones(4)
    matrix = MatrixSlice("lora_A", torch.Size((1, 4)), tuple(rectangles(0, 4, 4)), True)
    update = MatrixUpdate(matrix, start.clone(), torch.ones(4), 1, 0.5, 0.1, frozen)
    assert update.live_grad().tolist() == [1.0, 0.0, 1.0, 0.0]
    update.move(direction)
    assert torch.equal(update.master[frozen].view(torch.int32), start[frozen].view(torch.int32))
    free = start[~frozen] * (1 - 0.5 * 0.1) - 0.5 * direction[~frozen]
    assert torch.allclose(update.master[~frozen], free)
