"""Imports all that cases use, once, for the processes that are forked afterwards."""

from __future__ import annotations

import gc
import importlib
import warnings

_STABLE = ("torch", "torch.profiler", "torch._subclasses.fake_tensor", "matplotlib.pyplot")
_STABLE += ("megatron.core.parallel_state", "megatron.core.tensor_parallel")
_STABLE += ("megatron.core.datasets.indexed_dataset", "safetensors.torch", "sentencepiece")
_PRODUCT = ("deepspeed", "relora_ds.train.main", "relora_ds.train.run", "relora_ds.data.prepare")


def import_everything() -> None:
    """Import libraries and product. Nothing here may use a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _STABLE:
            importlib.import_module(name)
        # An engine's end collects garbage, which takes a quarter of a second over all of torch.
        # DeepSpeed comes later: the product looks for one of its objects among the collected ones.
        gc.freeze()
        for name in _PRODUCT:
            importlib.import_module(name)
