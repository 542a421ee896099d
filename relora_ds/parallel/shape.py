"""Shapes of parameters that may be cut over processes."""

from __future__ import annotations

import torch
from torch import nn


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where this process holds only a slice of it."""
    # ZeRO stage 3 leaves an empty placeholder and notes the true shape on the parameter
    return getattr(parameter, "ds_shape", parameter.shape)
