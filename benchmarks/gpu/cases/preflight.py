"""Stage A: what the machine is, and the ceilings that every other figure is compared with."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.case import Case, CaseSkippedError, Figures, Sizes, synchronize
from relora_ds.engine.accelerator import check_accelerator, describe_machine
from relora_ds.numerics.padding import cut, padded

_HOST_REGISTER_SUCCESS = 0
_MIN_COPY_FRACTION = 0.5
# copies of large data on the devices that the report is written for, bytes read and written
_COPY_FLOORS = {"H100": 2.5e12, "H200": 3.5e12}


def cases(tiny: bool) -> list[Case]:
    """All of the stage."""
    return [
        Case("A", "machine", machine, expected_s=4, value=100, alone=True),
        Case("A", "copy", copy, expected_s=4, value=40, alone=True),
        Case("A", "gemm 5461 and 5464", odd_widths, expected_s=6, value=50, alone=True),
        Case("A", "registered host memory", registered, expected_s=4, value=30),
        Case("A", "attention backends", attention_backends, expected_s=5, value=40),
    ]


def machine(device: torch.device, sizes: Sizes) -> Figures:
    """The device answers, and the libraries are there."""
    check_accelerator()
    import deepspeed
    import megatron.core

    assert float(torch.ones(3, device=device).sum()) == 3.0
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    figures: Figures = {
        "machine": describe_machine(device),
        "deepspeed": deepspeed.__version__,
        "megatron": megatron.core.__version__,
        "memlock_bytes": soft,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        capability = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        figures |= {"free_bytes": free, "total_bytes": total, "capability": capability}
    return figures


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of one call, after one that is not counted."""
    work()
    synchronize(device)
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def copy(device: torch.device, sizes: Sizes) -> Figures:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.ones(sizes.pick(1 << 18, 1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, 10)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, floor in _COPY_FLOORS.items():
            if known in name:
                assert rate >= floor, f"copies at {rate / 1e12:.2f} TB/s, less than {floor / 1e12}"
    return {"copy_bytes_per_s": rate}


def odd_widths(device: torch.device, sizes: Sizes) -> Figures:
    """What rows cost that are not aligned to 16 bytes, as those of 5461 in the 1.3B model's MLP,
    and what is left of that.

    Products of a weight (m, n) whose odd side is m (`up`) or n (`down`): as it is, at an aligned
    width, from a `filled` copy of the weight or into a cut gradient, as `train.pad_mlp` has them,
    and with the odd number of columns in rows of the aligned `pitch`.
    """
    tokens, hidden = sizes.pick(64, 8192), sizes.pick(32, 2048)
    odd, even = sizes.pick((43, 48), (5461, 5464))

    def drawn(rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols, device=device, dtype=torch.bfloat16)

    x, y, up, down = (
        drawn(tokens, hidden),
        drawn(tokens, even),
        drawn(odd, hidden),
        drawn(hidden, odd),
    )
    pitched = padded(down, hidden, even)[:, :odd]
    ways = {
        str(odd): (y[:, :odd].contiguous(), up, down),
        str(even): (y, padded(up, even, hidden), padded(down, hidden, even)),
        "pitch": (y[:, :odd], up, pitched),
    }
    products: dict[str, Callable[[], object]] = {}
    for way, (wide, above, below) in ways.items():
        products |= {
            f"up_forward_{way}": lambda w=above: x @ w.t(),
            f"up_input_{way}": lambda y=wide, w=above: y @ w,
            f"up_weight_{way}": lambda y=wide: y.t() @ x,
            f"down_forward_{way}": lambda y=wide, w=below: y @ w.t(),
            f"down_input_{way}": lambda w=below: x @ w,
            f"down_weight_{way}": lambda y=wide: x.t() @ y,
        }
    products |= {
        "up_forward_filled": lambda: x @ padded(up, even, hidden).t(),
        "up_input_filled": lambda: y @ padded(up, even, hidden),
        "up_weight_filled": lambda: cut(y.t() @ x, odd, hidden),
        "down_forward_filled": lambda: y @ padded(down, hidden, even).t(),
        "down_input_filled": lambda: x @ padded(down, hidden, even),
        "down_weight_filled": lambda: cut(x.t() @ y, hidden, odd),
    }
    work = 2 * tokens * hidden * odd / 1e12
    return {
        f"{name}_tflops": work / seconds_of(product, device, sizes.pick(2, 10))
        for name, product in products.items()
    }


def registered(device: torch.device, sizes: Sizes) -> Figures:
    """Whether memory of the host can be registered for direct copies, and how fast they are."""
    host = torch.zeros(sizes.pick(1 << 12, 1 << 26), dtype=torch.uint8)
    if device.type != "cuda":
        raise CaseSkippedError("only memory that a GPU reads is registered")
    runtime: Any = torch.cuda.cudart()
    torch.cuda.current_stream(device).synchronize()
    code = int(runtime.cudaHostRegister(host.data_ptr(), host.numel(), 0))
    if code != _HOST_REGISTER_SUCCESS:
        raise CaseSkippedError(f"cudaHostRegister says {code}: copies go through pageable memory")
    on_device = torch.empty_like(host, device=device)
    rate = host.numel() / seconds_of(lambda: on_device.copy_(host, non_blocking=True), device, 5)
    runtime.cudaHostUnregister(host.data_ptr())
    assert ctypes.string_at(host.data_ptr(), 1) == b"\0"
    return {"host_to_device_bytes_per_s": rate}


def attention_backends(device: torch.device, sizes: Sizes) -> Figures:
    """Which of torch's kernels serve bf16 heads in both directions, and how fast."""
    batch, length, heads, width = sizes.pick((1, 16, 2, 8), (16, 512, 32, 64))
    shape = (batch, heads, length, width)
    figures: Figures = {}
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        q, k, v = (
            torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )

        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                seconds = seconds_of(lambda heads=(q, k, v): _both_ways(*heads), device, 3)
            figures[f"{backend.lower()}_ms"] = 1e3 * seconds
        except RuntimeError as error:
            figures[backend.lower()] = f"no: {str(error).splitlines()[0]}"
    assert "math_ms" in figures, figures
    return figures


def _both_ways(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
