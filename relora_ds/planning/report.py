"""A plan in words and a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_GB = 1e9
_ALIKE = "- alike on all GPUs of a copy"


_TENSOR_ROWS: tuple[tuple[str, Any], ...] = (
    ("- tensor-parallel, within (GB)", lambda e: f"{e['traffic']['tensor_within_node'] / _GB:.3f}"),
    (
        "- tensor-parallel, to others (GB)",
        lambda e: f"{e['traffic']['tensor_between_nodes'] / _GB:.3f}",
    ),
    ("tensor-parallel, never overlapped (s)", lambda e: f"{e['seconds']['tensor']:.3f}"),
)


def show_plan(found: dict[str, Any], console: Console) -> None:
    """Print what `plan.plan` returns."""
    cluster, asked, suggested = found["cluster"], found["asked"], found["suggested"]
    shared = f" of {asked['tensor']} tensor-parallel GPUs each" if asked["tensor"] > 1 else ""
    console.print(
        f"{cluster['gpus']} GPUs, {cluster['gpus_per_node']} per node, "
        f"{cluster['gpu_memory'] / _GB:.0f} GB each; {found['processes']} data-parallel "
        f"processes{shared}"
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
    if len(found["sizes"]) > 1:
        console.print(
            "\nwith each tensor-parallel size and low_rank_plan, the fastest stage that fits:"
        )
        console.print(_sizes(found["sizes"]))
    if suggested is None:
        console.print("\nnothing fits: lower train.micro_batch_size or method.rank")
    elif _way(suggested) == _way(asked):
        console.print(f"\n{_way(asked)}, as the run asks for, is the fastest that fits")
    else:
        console.print(
            f"\nsuggested: {_way(suggested)} instead of {_way(asked)}: the fastest that fits"
        )


def _way(cut: dict[str, Any]) -> str:
    return f"ZeRO stage {cut['stage']} with parallel.tensor {_size(cut)}"


def _size(cut: dict[str, Any]) -> str:
    plan = cut["low_rank_plan"]
    return str(cut["tensor"]) + (f" ({plan})" if plan != "auto" else "")


def _sizes(sizes: list[dict[str, Any]]) -> Table:
    rows: list[tuple[str, Any]] = [
        ("ZeRO stage", lambda c: c["stage"]),
        ("together (GB)", lambda c: f"{c['bytes_per_gpu'] / _GB:.2f}"),
        ("fits", lambda c: "yes" if c["fits"] else "no"),
        ("states (GB)", lambda c: f"{c['states'] / _GB:.2f}"),
        (_ALIKE, lambda c: f"{c['states_held_alike'] / _GB:.2f}"),
        ("largest micro-batch", lambda c: str(c["largest_micro_batch"])),
        ("step, one after the other (s)", lambda c: f"{c['seconds']:.3f}"),
    ]
    table = Table("parallel.tensor", *map(_size, sizes))
    for label, cell in rows:
        table.add_row(label, *(cell(candidate) for candidate in sizes))
    return table


def _table(stages: dict[str, Any]) -> Table:
    rows: list[tuple[str, Any]] = [
        (f"{part} (GB)", lambda e, part=part: f"{e['memory'][part] / _GB:.2f}")
        for part in next(iter(stages.values()))["memory"]
        if any(e["memory"][part] for e in stages.values())
    ]
    tensor = any(e["traffic"]["tensor_payload"] for e in stages.values())
    rows += [
        ("together (GB)", lambda e: f"{e['bytes_per_gpu'] / _GB:.2f}"),
        ("fits", lambda e: "yes" if e["fits"] else "no"),
        ("largest micro-batch", lambda e: str(e["largest_micro_batch"])),
        ("gradients moved (GB)", lambda e: f"{e['traffic']['gradient_payload'] / _GB:.3f}"),
        ("sent within the node (GB)", lambda e: f"{e['traffic']['within_node'] / _GB:.3f}"),
        ("sent to other nodes (GB)", lambda e: f"{e['traffic']['between_nodes'] / _GB:.3f}"),
        *(_TENSOR_ROWS if tensor else ()),
        ("computing (s)", lambda e: f"{e['seconds']['compute']:.3f}"),
        ("communicating (s)", lambda e: f"{e['seconds']['communication']:.3f}"),
        ("step, overlapped (s)", lambda e: f"{e['seconds']['overlapped']:.3f}"),
        ("step, one after the other (s)", lambda e: f"{e['seconds']['serial']:.3f}"),
    ]
    if tensor:
        alike = (_ALIKE, lambda e: f"{e['states_held_alike'] / _GB:.2f}")
        states = next(n for n, (label, _) in enumerate(rows) if label.startswith("states"))
        rows.insert(states + 1, alike)
    table = Table("ZeRO stage", *stages)
    for label, cell in rows:
        table.add_row(label, *(cell(estimate) for estimate in stages.values()))
    return table
