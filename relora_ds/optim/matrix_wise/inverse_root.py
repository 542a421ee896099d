"""The inverse square root of a Gram matrix, by products and two triangular factorisations.

With G = D^T D it makes all singular values of D equal: D G^(-1/2) is the polar factor of D. Eight
Newton-Schulz steps in fp64 take 24 products to come within one per cent of it; this takes two
inverses and a product in fp64, which lift the small singular values, and six products in fp32,
which see only numbers of about one. The same operations run on every device, whatever the values
are, and none of them has the host wait.
"""

from __future__ import annotations

from functools import cache

import torch

SMALLEST = 1e-4
"""Singular values from here to 1 end within 2e-7 of 1 by the formula; smaller ones end below."""

_SCALE = 1.2993843035252752
_WEIGHTS = (0.0008445645579506839, 0.05774421556432555)
_SHIFTS = (1.6832229312099124e-07, 0.0008328948855654743)
"""s c (1 + sum w / (s^2 + t)) is the best approximation to 1 that a fraction of degrees 5 and 4 has
on [`SMALLEST`, 1] (Zolotarev's), and leaves values between 0.62 and 1.38."""

_LOW, _HIGH = 0.3900611999678171, 1.8918660115397645
"""Between which the squares of these values lie."""
_POLYNOMIAL = (
    (0.9361901932945683, -0.30806742614255644, 0.1520659145849007, -0.08339971891855216),
    (0.04793045442206953, -0.02838525582770246, 0.01789495329656976, -0.010959083892709387),
    (0.0037374706763841914, -0.0022657743164131716, 0.007863154741095002, -0.0050157168478506264),
    (-0.004449853706177009, 0.0028671279185346066, 0.0028626846292354458, -0.0018349930069234688),
)
"""Of x^(-1/2) between them, from Chebyshev points, in u = (2 x - high - low) / (high - low): four
coefficients by rising power, times 1, u^4, u^8 and u^12."""


def inverse_root(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two symmetric matrices whose product is G^(-1/2), as far as eigenvalues are not too small.

    The first one may have large numbers and the second has none; their product is left to the
    caller, who multiplies something smaller with one after the other.

    Args:
        gram: G (batch, k, k), fp64, positive semi-definite, no eigenvalue above 1.

    Returns:
        Like `gram`, in fp64 and in fp32. Where an eigenvalue is below `SMALLEST` squared, their
        product has a number between 0 and its inverse root.
    """
    shifted = torch.stack([gram] * len(_SHIFTS))
    for matrices, shift in zip(shifted, _SHIFTS, strict=True):
        matrices.diagonal(dim1=-2, dim2=-1).add_(shift)
    lower, _ = torch.linalg.cholesky_ex(shifted)  # which waits for nothing
    rough, rough_gram = torch.zeros_like(gram), _SCALE * gram  # the latter G times the former
    for inverse, weight, shift in zip(_inverse(lower), _WEIGHTS, _SHIFTS, strict=True):
        rough.add_(inverse, alpha=_SCALE * weight)
        rough_gram.sub_(inverse, alpha=_SCALE * weight * shift)
    rough.diagonal(dim1=-2, dim2=-1).add_(_SCALE)
    rough_gram.diagonal(dim1=-2, dim2=-1).add_(_SCALE * sum(_WEIGHTS))
    return rough, _root_about_one((rough_gram @ rough).float())


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """The inverses of L L^T (..., k, k)."""
    if lower.device.type == "cpu":
        return torch.cholesky_inverse(lower)
    return inverse_by_products(lower)


def inverse_by_products(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of L L^T (batch, k, k), where `torch.cholesky_inverse` has the host wait."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse.mT @ inverse


def _root_about_one(matrices: torch.Tensor) -> torch.Tensor:
    """The inverse roots of matrices (batch, k, k) with eigenvalues between `_LOW` and `_HIGH`."""
    width = _HIGH - _LOW
    powers = matrices.new_empty(3, *matrices.shape)  # u, u^2 and u^3
    first = torch.mul(matrices, 2 / width, out=powers[0])
    first.diagonal(dim1=-2, dim2=-1).sub_((_HIGH + _LOW) / width)
    torch.bmm(first, first, out=powers[1])
    torch.bmm(powers[1], first, out=powers[2])
    fourth = powers[1] @ powers[1]
    coefficients = _coefficients(matrices.device)
    blocks = (coefficients[:, 1:] @ powers.flatten(1)).view(-1, *matrices.shape)
    blocks.diagonal(dim1=-2, dim2=-1).add_(coefficients[:, :1, None])
    found = blocks[3]
    for block in (blocks[2], blocks[1], blocks[0]):
        found = torch.baddbmm(block, fourth, found)
    return found


@cache
def _coefficients(device: torch.device) -> torch.Tensor:
    """Of the polynomial, fp32; kept, as every copy to a GPU would have the host wait."""
    return torch.tensor(_POLYNOMIAL, dtype=torch.float32, device=device)
