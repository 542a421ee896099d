"""The door to Megatron's token file format, opened late: importing it takes seconds."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def indexed_dataset_module() -> ModuleType:
    """`megatron.core.datasets.indexed_dataset`, without its warnings on optional packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")
