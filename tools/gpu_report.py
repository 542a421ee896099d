"""Prove a GPU, or measure it: many small cases, each in processes of its own. See --help."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

_EXAMPLE = """
examples:
  python tools/gpu_report.py checks --budget 520 --out gpu_report
  python tools/gpu_report.py all --device cpu --tiny      # all of its code, in less than a minute

Exit code: 0, or 1 if a case failed. DIR/report.jsonl has one line per case; what is written there
carries device, clocks, versions and date. See docs/gpu.md.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["checks", "speed", "all"], help="what to run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes; figures mean nothing")
    parser.add_argument("--budget", type=float, default=540.0, metavar="S", help="seconds")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), metavar="DIR")
    arguments = parser.parse_args()
    if arguments.budget <= 0:
        parser.error(f"--budget is {arguments.budget:g}, but must be positive")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu computes too slowly for full sizes: add --tiny")
    _prepare(arguments.device)
    from benchmarks.gpu.report import run_report

    chosen = arguments.verb, arguments.device, arguments.tiny
    return run_report(*chosen, arguments.budget, arguments.out.resolve())


def _prepare(device: str) -> None:
    """Say where to compute, before torch and DeepSpeed are imported."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    os.environ["DS_ACCELERATOR"] = device
    # one launch is not one of this process's
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "LOCAL_SIZE": "1"}
    else:
        # counts devices without starting CUDA, which could not be used after a fork then
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


if __name__ == "__main__":
    sys.exit(main())
