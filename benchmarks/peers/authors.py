"""The linear layers of the methods' authors, out of trees of their repositories.

    relora       ReLoRaLinear       peft_pretraining/relora.py     github.com/Guitaricet/relora
    switchlora   SwitchLoraLinear   switchlora/switch_lora.py      github.com/asfsdsf/SwitchLoRA
    sltrain      SpLoRaLinear       splora/splora_linear.py        github.com/andyjm3/SLTrain

Each is given the weights of a layer of ours, so that both compute the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from relora_ds.errors import ConfigError
from relora_ds.methods.sltrain.support import flat_positions

_FILES = {
    "relora": "peft_pretraining/relora.py",
    "switchlora": "switchlora/switch_lora.py",
    "sltrain": "splora/splora_linear.py",
}
_UNUSED = ("bitsandbytes", "bitsandbytes.functional", "torchinfo", "matplotlib.pyplot")
"""What their modules import for quantisation, summaries and plots."""

Maker = Callable[[nn.Module, float], nn.Module]
"""Makes their layer of the weights of ours, with a rate of dropout."""


def find_authors(trees: Path) -> dict[str, Maker]:
    """Methods whose authors' tree is at or below a directory.

    Args:
        trees: one of the trees, or a directory of several.

    Raises:
        ConfigError: there is none, or a package that one of them needs is missing.
    """
    makers = {"relora": _relora, "switchlora": _switchlora, "sltrain": _sltrain}
    found = {}
    for method, name in _FILES.items():
        files = [*trees.glob(name), *trees.glob(f"*/{name}")]
        if files:
            found[method] = makers[method](files[0])
    if not found:
        wanted = ", ".join(_FILES.values())
        raise ConfigError(f"{trees} holds none of {wanted}: clone the authors' repositories there")
    return found


def _relora(file: Path) -> Maker:
    kind: Any = _load(file, "authors_relora").ReLoRaLinear

    def make(ours: Any, dropout: float) -> nn.Module:
        theirs = kind(
            ours.spec.in_features,
            ours.spec.out_features,
            ours.rank,
            lora_alpha=ours.scale * ours.rank,
            lora_dropout=dropout,
            bias=False,
            quantize=None,
        )
        _fill(theirs, {"weight": ours.weight, "lora_A.weight": ours.lora_A})
        _fill(theirs, {"lora_B.weight": ours.lora_B})
        return theirs

    return make


def _switchlora(file: Path) -> Maker:
    sys.path.insert(0, str(file.parents[1]))
    kind: Any = _import("switchlora.switch_lora").SwitchLoraLinear

    def make(ours: Any, dropout: float) -> nn.Module:
        spec, alpha = ours.spec, ours.scale * ours.rank
        theirs = kind(spec.in_features, spec.out_features, ours.rank, alpha, dropout, bias=False)
        _fill(theirs, {name: getattr(ours, name) for name in ("weight", "lora_A", "lora_B")})
        return theirs

    return make


def _sltrain(file: Path) -> Maker:
    from torch.utils import cpp_extension

    source = file.parents[1] / "sparse-lora" / "sparse_linear.cpp"
    built: Any = cpp_extension.load("sltrain_linear", [str(source)])
    sys.modules["sltrain_linear"] = built
    kind: Any = _load(file, "authors_sltrain").SpLoRaLinear

    def make(ours: Any, dropout: float) -> nn.Module:
        spec = ours.spec
        theirs = kind(
            spec.in_features,
            spec.out_features,
            ours.rank,
            (ours.values.numel() + 0.5) / (spec.in_features * spec.out_features),
            lora_alpha=ours.scale * ours.rank,
            bias=False,
        )
        _fill(theirs, {"lora_A": ours.lora_A, "lora_B": ours.lora_B, "sparse_value": ours.values})
        theirs.sparse_index = flat_positions(ours.row_starts, ours.columns, spec.in_features)
        return theirs

    return make


def _fill(layer: nn.Module, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            layer.get_parameter(name).copy_(value)


def _load(file: Path, name: str) -> ModuleType:
    """A module by its file, whatever packages lie beside it."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _told(lambda: spec.loader.exec_module(module))  # pyright: ignore[reportOptionalMemberAccess]
    return module


def _import(name: str) -> ModuleType:
    return _told(lambda: importlib.import_module(name))


def _told(load: Callable[[], Any]) -> Any:
    try:
        with _stand_ins():
            return load()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the authors' code needs the package {error.name}, which is not installed: run "
            f"`pip install {error.name}`"
        ) from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules for what their layers import and do not use here.

    They are gone afterwards: whoever asks then whether a package is there must not find them.
    """
    absent = [name for name in _UNUSED if not _is_there(name.partition(".")[0])]
    modules = {name: ModuleType(name) for name in absent}
    if not _is_there("loguru"):
        quiet: Any = ModuleType("loguru")
        quiet.logger = SimpleNamespace(warning=print, info=print)
        modules["loguru"] = quiet
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _is_there(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None
