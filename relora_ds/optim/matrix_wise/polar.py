"""The nearest matrix with equal singular values, by steps that are matrix products only.

For M = U S V^T these iterations approach U V^T: each step applies an odd polynomial
a s + b s^3 + c s^5 to all singular values, without knowing them.
"""

from __future__ import annotations

import torch

Coefficients = tuple[tuple[float, float, float], ...]

POLAR_EXPRESS: Coefficients = (
    (7.2086, -15.5131, 9.0178),
    (3.9623, -2.5813, 0.4542),
    (3.9466, -2.5765, 0.4544),
    (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653),
    (3.1390, -2.3073, 0.4733),
    (2.1715, -1.5246, 0.3885),
    (1.8648, -1.2224, 0.3577),
)
"""Steps of Polar Express (arXiv 2505.16932): the best polynomial of each step for what the one
before has left. Singular values from about 1e-3 of the largest on end within 1 % of 1."""

KELLER: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Five equal steps of the original Muon, which torch.optim.Muon takes too. Singular values end
between about 0.7 and 1.2."""

_EPS = 1e-7


def polar(matrices: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """Approximate polar factors of a batch of matrices.

    Args:
        matrices: (batch, m, n), in the dtype to compute in.
        coefficients: (a, b, c) of each step.

    Returns:
        (batch, m, n); zeros for a matrix of zeros.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for a, b, c in coefficients:
        gram = x @ x.mT
        mixed = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, mixed, x, beta=a)
    return x.mT if tall else x
