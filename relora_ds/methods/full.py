"""Full-rank training: the baseline, and the warm start of every adapter method."""

from __future__ import annotations

from torch import nn

from relora_ds.config.methods.full import FullConfig
from relora_ds.config.sections import OptimizerConfig
from relora_ds.methods.interface import Method
from relora_ds.model.init import EMBEDDING, HEAD
from relora_ds.optim.matrix import MatrixOptimizer
from relora_ds.optim.matrix_wise.muon import Muon
from relora_ds.optim.matrix_wise.polar import KELLER, POLAR_EXPRESS
from relora_ds.optim.matrix_wise.scale import Scale
from relora_ds.parallel.shape import global_shape

_STEPS = {"polar_express": POLAR_EXPRESS, "keller": KELLER}


class Full(Method[FullConfig]):
    """Every weight is trained; whole matrices may have an optimizer of their own."""

    def matrix_optimizer(
        self, settings: OptimizerConfig, name: str, parameter: nn.Parameter
    ) -> MatrixOptimizer | None:
        is_end = name in (EMBEDDING, HEAD)
        if settings.matrix is None or is_end or len(global_shape(parameter)) != 2:
            return None
        if settings.matrix == "scale":
            return Scale()
        muon = settings.muon
        return Muon(muon.momentum, muon.nesterov, _STEPS[muon.steps], muon.shape_factor)
