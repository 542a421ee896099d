"""Peak arithmetic rates of accelerators: the denominator of model FLOPs utilisation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class _Device:
    """Dense peaks in TFLOP/s: bf16 on matrix cores, fp32 outside of them (no TF32).

    Vendors print matrix rates with 2:4 sparsity as the headline; these are without it.
    """

    pattern: str
    bf16: float | None
    fp32: float


# The first pattern found in the device name wins: variants stand before the plain name.
_DEVICES = (
    # NVIDIA Blackwell Ultra datasheet: GB300 NVL72 and HGX B300
    _Device(r"\bG?B300\b", 2500.0, 75.0),
    # nvidia.com/en-us/data-center/dgx-b200 and gb200-nvl72 (72 PFLOP/s sparse FP8 for 8 B200)
    _Device(r"\bGB200\b", 2500.0, 80.0),
    _Device(r"\bB200\b", 2250.0, 75.0),
    # NVIDIA H200 datasheet: SXM, NVL
    _Device(r"\bH200 NVL\b", 835.5, 60.0),
    _Device(r"\bG?H200\b", 989.4, 66.9),
    _Device(r"\bH20\b", 148.0, 44.0),
    # NVIDIA H100 datasheet and Hopper whitepaper, appendix A: PCIe, NVL, SXM5 (also sold as H800)
    _Device(r"\bH[18]00 PCIe\b", 756.0, 51.2),
    _Device(r"\bH100 NVL\b", 835.5, 60.0),
    _Device(r"\bH[18]00\b", 989.4, 66.9),
    # NVIDIA A100 datasheet: PCIe and SXM4 alike; A800 differs in NVLink only
    _Device(r"\bA[18]00\b", 312.0, 19.5),
    # NVIDIA A30, A40, A10 and RTX A6000 datasheets
    _Device(r"\bA30\b", 165.0, 10.3),
    _Device(r"\bA40\b", 149.7, 37.4),
    _Device(r"\bA10G\b", 70.0, 35.0),
    _Device(r"\bA10\b", 125.0, 31.2),
    _Device(r"\bRTX A6000\b", 154.8, 38.7),
    # NVIDIA L40S, L40, L4 and RTX 6000 Ada datasheets
    _Device(r"\bL40S\b", 362.05, 91.6),
    _Device(r"\bL40\b", 181.05, 90.5),
    _Device(r"\bL4\b", 121.0, 30.3),
    _Device(r"\bRTX 6000 Ada\b", 364.2, 91.1),
    # RTX Blackwell architecture whitepaper: bf16 with fp32 accumulation
    _Device(r"\bRTX PRO 6000 Blackwell\b", 503.8, 126.0),
    _Device(r"\bRTX 5090(?! (?:D|Laptop)\b)", 209.5, 104.8),
    # Ada and Ampere GA102 whitepapers, appendix A: bf16 with fp32 accumulation
    _Device(r"\bRTX 4090(?! (?:D|Laptop)\b)", 165.2, 82.6),
    _Device(r"\bRTX 3090(?! Ti\b)", 71.0, 35.6),
    # NVIDIA V100 and T4 datasheets; matrix cores before Ampere have no bf16
    _Device(r"\bV100-PCIE\b", None, 14.0),
    _Device(r"\bV100\b", None, 15.7),
    _Device(r"\bT4\b", None, 8.1),
    # AMD CDNA data sheets. Each of the two dies of an MI250X is a device of its own.
    _Device(r"\bMI3(?:00X|25X)\b", 1307.4, 163.4),
    _Device(r"\bMI250X\b", 191.5, 23.95),
)


def peak_flops(device_name: str, precision: Literal["bf16", "fp32"]) -> float | None:
    """Dense peak of one device in FLOP/s, or None where it is not known.

    Args:
        device_name: as given by ``torch.cuda.get_device_name``.
        precision: working precision of the run; fp32 means without TF32.
    """
    for device in _DEVICES:
        if re.search(device.pattern, device_name, flags=re.IGNORECASE):
            teraflops = device.bf16 if precision == "bf16" else device.fp32
            return None if teraflops is None else teraflops * 1e12
    return None
