"""Kernels in Triton without a GPU: interpreted on the CPU, and compiled for GPUs that are absent.

`python -m tests.harness.kernels KERNEL... TARGET...` compiles kernels (default: all) for targets,
such as 90 for sm_90, and prints what they take, as JSON: for each kernel and target registers,
bytes of stack and bytes of shared memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REASON = "triton is not installed: pip install triton==3.9.0, as launch/test.sh does in its .venv"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compute on the CPU during the test, under the interpreter; see `tests.conftest`."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this session has a GPU, for which kernels are compiled")
    # the interpreter of 3.6 fails with today's NumPy; what it compiles for GPUs is the same
    pytest.importorskip("triton", minversion="3.9", reason=f"an old Triton, or none: {REASON}")
    monkeypatch.setenv("RELORA_DS_TRITON", "cpu")


class Variant(NamedTuple):
    """A kernel as the product starts it."""

    module: str
    """Within `relora_ds.numerics.gpu`."""
    function: str
    arguments: Mapping[str, str]
    """Triton's types of what is not known when it is compiled."""
    constants: Mapping[str, Any]
    """The rest; types of tensors by their names."""
    warps: int = 4
    stages: int = 3
    fused: bool = False
    """Whether a product and a sum may be rounded once."""


_TABLE = {"table": "*i64"}
_SPARSE = {"dense": "*bf16", "row_starts": "*i32", "columns": "*i16", "values": "*bf16"}
_ADVANCE = {
    **dict.fromkeys(("p", "grad", "first", "second", "first_scales", "second_scales"), "*fp32"),
    **dict.fromkeys(("tables", "scale", "factors"), "*fp32"),
    "nearby": "*u8",
    "rectangles": "*i64",
    **dict.fromkeys(("number", "count", "length"), "i32"),
    **dict.fromkeys(("take1", "beta2", "take2"), "fp32"),
    **dict.fromkeys(("first_key", "second_key"), "i64"),
}
_CODES = {"first": "*i8", "second": "*u8"}
VARIANTS: dict[str, Variant] = {
    "copy rows": Variant(
        "rows",
        "copy_row",
        _TABLE,
        {"target_type": "fp32", "source_type": "bf16", "block": 1024},
    ),
    "clear rows": Variant("rows", "clear_row", _TABLE, {"target_type": "fp32", "block": 1024}),
    "draw rows": Variant("draws", "draw_row", _TABLE, {"target_type": "bf16", "block": 512}),
    "add at the support": Variant(
        "support", "add_row", _SPARSE | {"width": "i32"}, {"block": 128}, warps=1
    ),
    "read at the support": Variant(
        "support", "read_row", _SPARSE | {"width": "i32"}, {"block": 128}, warps=1
    ),
    "fingerprints, bf16": Variant(
        "fingerprints",
        "add_up",
        _TABLE | {"sums": "*i64"},
        {"kind": "i16", "per_word": 4, "width": 4096, "block": 1024},
    ),
    "factors of vectors": Variant(
        "adamw",
        "vector_factors",
        {
            "times": "*i32",
            "rates": "*fp64",
            "corrections": "*fp64",
            "factors": "*fp32",
            "count": "i32",
            "ages": "i32",
            "step": "i32",
        },
        {"block": 256},
    ),
    **{
        f"adamw, {name}": Variant(
            "adamw",
            "advance",
            _ADVANCE | types,
            {"coded": coded, "rounded": rounded, "blocks": 2},
        )
        for name, coded, rounded, types in (
            ("fp32", False, False, {}),
            ("bf16", False, True, {"p": "*bf16", "grad": "*bf16"}),
            ("codes, fp32", True, False, _CODES),
            ("codes, bf16", True, True, {"p": "*bf16", "grad": "*bf16"} | _CODES),
        )
    },
    **{
        f"absorb, {name}": Variant(
            "exchange",
            "absorb_exchange",
            _TABLE | {"scale": "fp32"},
            {
                "store": store,
                "working_type": kind,
                "vector_type": kind,
                "rows": 32,
                "cols": 64,
                "vectors": 16,
            },
            warps=8,
            stages=1,
            fused=True,
        )
        for name, store, kind in (
            ("fp32", 0, "fp32"),
            ("bf16 and residual", 1, "bf16"),
            ("bf16 and fp32", 2, "bf16"),
        )
    },
}


def compiled(names: Sequence[str], targets: Sequence[int]) -> Iterator[tuple[str, int, list[int]]]:
    """What kernels take on every target; needs a process without the interpreter."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = {"fp32": tl.float32, "bf16": tl.bfloat16, "i16": tl.int16}
    for name in names:
        variant = VARIANTS[name]
        function = getattr(
            import_module(f"relora_ds.numerics.gpu.{variant.module}"), variant.function
        )
        constants = {key: named.get(value, value) for key, value in variant.constants.items()}
        signature = {each: variant.arguments.get(each, "constexpr") for each in function.arg_names}
        source = ASTSource(function, signature, constants)
        options = {
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            "enable_fp_fusion": variant.fused,
        }
        for target in targets:
            kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            yield name, target, [*_usage(kernel.asm["cubin"]), kernel.metadata.shared]


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, where spilled ones go."""
    import triton

    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    taken: dict[str, dict[int, list[int]]] = {}
    numbers = [int(each) for each in sys.argv[1:] if each.isdigit()]
    kernels = [each for each in sys.argv[1:] if not each.isdigit()] or list(VARIANTS)
    for label, number, figures in compiled(kernels, numbers):
        taken.setdefault(label, {})[number] = figures
    json.dump(taken, sys.stdout, indent=1)
