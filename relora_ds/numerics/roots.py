"""Square roots of fp32 tensors on the host, rounded once as IEEE 754 asks for."""

from __future__ import annotations

import numpy as np
import torch


def ieee_roots(values: torch.Tensor) -> torch.Tensor:
    """Roots of fp32 values on the host, in place.

    They are those of C and of GPUs. torch's own on CPUs come from a library of vector functions and
    may miss by a unit in the last place.
    """
    array = values.numpy()
    np.sqrt(array, out=array)
    return values
