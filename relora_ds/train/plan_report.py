"""A plan in words and a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_GB = 1e9


def show_plan(found: dict[str, Any], console: Console) -> None:
    """Print what `plan.plan` returns."""
    cluster = found["cluster"]
    console.print(
        f"{cluster['gpus']} GPUs, {cluster['gpus_per_node']} per node, "
        f"{cluster['gpu_memory'] / _GB:.0f} GB each; {found['processes']} data-parallel processes"
    )
    for name, phase in found["phases"].items():
        console.print(
            f"\nphase {name}: {phase['trained']:,} trained and {phase['frozen']:,} frozen "
            "parameters; per GPU and optimizer step"
        )
        console.print(_table(phase["stages"]))
        hosts = {e["host_bytes_per_node"] for e in phase["stages"].values()}
        if hosts and max(hosts):
            console.print(f"host memory for candidates: {max(hosts) / _GB:.1f} GB per node")
    suggested = found["suggested"]
    if suggested is None:
        console.print("\nnothing fits: lower train.micro_batch_size or method.rank")
    elif suggested == found["asked"]:
        console.print(f"\nZeRO stage {suggested}, as the run asks for, is the fastest that fits")
    else:
        console.print(
            f"\nsuggested: ZeRO stage {suggested} instead of {found['asked']}: "
            "the fastest that fits"
        )


def _table(stages: dict[str, Any]) -> Table:
    rows: list[tuple[str, Any]] = [
        (f"{part} (GB)", lambda e, part=part: f"{e['memory'][part] / _GB:.2f}")
        for part in next(iter(stages.values()))["memory"]
        if any(e["memory"][part] for e in stages.values())
    ]
    rows += [
        ("together (GB)", lambda e: f"{e['bytes_per_gpu'] / _GB:.2f}"),
        ("fits", lambda e: "yes" if e["fits"] else "no"),
        ("largest micro-batch", lambda e: str(e["largest_micro_batch"])),
        ("gradients moved (GB)", lambda e: f"{e['traffic']['gradient_payload'] / _GB:.3f}"),
        ("sent within the node (GB)", lambda e: f"{e['traffic']['within_node'] / _GB:.3f}"),
        ("sent to other nodes (GB)", lambda e: f"{e['traffic']['between_nodes'] / _GB:.3f}"),
        ("computing (s)", lambda e: f"{e['seconds']['compute']:.3f}"),
        ("communicating (s)", lambda e: f"{e['seconds']['communication']:.3f}"),
        ("step, overlapped (s)", lambda e: f"{e['seconds']['overlapped']:.3f}"),
        ("step, one after the other (s)", lambda e: f"{e['seconds']['serial']:.3f}"),
    ]
    table = Table("ZeRO stage", *stages)
    for label, cell in rows:
        table.add_row(label, *(cell(estimate) for estimate in stages.values()))
    return table
