"""What a layer computes between its products, as kernels of torch's compiler.

Each function is a few passes over activations in plain operations, and one kernel forwards and one
backwards when compiled. The compiler computes in fp32 throughout and rounds once, at the end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import torch

from relora_ds.errors import ConfigError

F = TypeVar("F", bound=Callable[..., object])

_REMEDY = "or set train.compile to false"


def compiled(function: F) -> F:
    """`function` as torch's compiler makes it, from its first call on.

    Args:
        function: of tensors, without effects, that the compiler can take whole.
    """

    @functools.cache
    def kernel() -> Callable[..., object]:
        # Seconds of imports, which runs without compiled layers do without. Training has one shape,
        # or two of queries and keys; kernels for any shape keep more for the backward pass.
        return torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def call(*args: object) -> object:
        return kernel()(*args)

    return call  # pyright: ignore[reportReturnType]


def check_compiler(device: torch.device) -> None:
    """Find out whether torch's compiler works for a device, before anything is built.

    Raises:
        ConfigError: it is switched off, or what it needs is not installed.
    """
    from torch._dynamo import config as dynamo

    # torch looks at the one when it is imported, at the other when something is compiled
    if dynamo.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise ConfigError(
            "train.compile is layers, but torch's compiler is off in this environment: unset "
            f"TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, {_REMEDY}"
        )
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise ConfigError(
                "train.compile is layers, but the package triton, in which torch writes kernels "
                f"for GPUs, is missing: install the one of torch {torch.__version__}, {_REMEDY}"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "train.compile is layers, but torch finds no C++ compiler: install g++ or clang++, "
            f"name one in CXX, {_REMEDY}"
        ) from error
