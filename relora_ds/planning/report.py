"""A plan in words and a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from relora_ds.planning.results import Candidate, Cut, Estimate, IslandsPlan, Plan

_GB, _MB = 1e9, 1e6
_ALIKE = "- alike on all GPUs of a copy"

_ROUND = ("islands.every", "sent per update (MB)", "times less", "update (s)", "local speed")

Shown = TypeVar("Shown")
Row = tuple[str, Callable[[Shown], str]]
"""Its label, and what it says of one column."""


def show_plan(found: Plan, console: Console) -> None:
    """Print a plan."""
    cluster, asked, suggested = found.cluster, found.asked, found.suggested
    shared = f" of {asked.tensor} tensor-parallel GPUs each" if asked.tensor > 1 else ""
    console.print(
        f"{cluster.gpus} GPUs, {cluster.gpus_per_node} per node, "
        f"{cluster.gpu_memory / _GB:.0f} GB each; {found.processes} data-parallel "
        f"processes{shared}"
    )
    for name, phase in found.phases.items():
        console.print(
            f"\nphase {name}: {phase.trained:,} trained and {phase.frozen:,} frozen "
            "parameters; per GPU and optimizer step"
        )
        console.print(_stages(phase.stages))
        host = max((each.host_bytes_per_node for each in phase.stages.values()), default=0)
        if host:
            console.print(f"host memory for candidates: {host / _GB:.1f} GB per node")
    if len(found.sizes) > 1:
        console.print(
            "\nwith each tensor-parallel size and low_rank_plan, the fastest stage that fits:"
        )
        console.print(_sizes(found.sizes))
    if suggested is None:
        console.print("\nnothing fits: lower train.micro_batch_size or method.rank")
    elif _way(suggested) == _way(asked):
        console.print(f"\n{_way(asked)}, as the run asks for, is the fastest that fits")
    else:
        console.print(
            f"\nsuggested: {_way(suggested)} instead of {_way(asked)}: the fastest that fits"
        )


def show_islands(phases: Mapping[str, IslandsPlan], console: Console) -> None:
    """Print what passes between islands."""
    for name, found in phases.items():
        console.print(
            f"\nphase {name}: {found.islands} islands; each sends "
            f"{found.round_bytes / _GB:.4f} GB at the end of a round in {found.bits} bits, "
            f"{(found.merge_bytes + found.refresh_bytes) / _GB:.4f} GB more where a "
            f"{'refresh' if found.refresh_bytes else 'merge'} follows; data parallelism of the full"
            f" model in bf16 sends {found.dense_bytes / _GB:.4f} GB per update, which then "
            f"takes {found.dense_seconds:.3f} s instead of {found.local_seconds:.3f} s"
        )
        if found.overlap or found.fragments > 1:
            console.print(
                f"{found.fragments} fragments of up to {found.fragment_bytes / _GB:.4f} GB travel "
                f"in turn, during {found.overlap} updates each"
            )
        table = Table(*_ROUND)
        for each in found.rounds:
            sent = f"{each.bytes_per_update / _MB:.3f}"
            speed = _seconds(each.seconds_per_update), f"{each.speed:.0%}"
            table.add_row(str(each.every), sent, f"{each.less:.0f}", *speed)
        console.print(table)
        best = found.best and f"islands.every={found.best}, the shortest with nine tenths of it"
        console.print(f"asked for: islands.every={found.asked.every}; suggested: {best or 'none'}")


def _way(cut: Cut) -> str:
    return f"ZeRO stage {cut.stage} with parallel.tensor {_size(cut)}"


def _size(cut: Cut) -> str:
    return str(cut.tensor) + (f" ({cut.low_rank_plan})" if cut.low_rank_plan != "auto" else "")


def _sizes(sizes: Sequence[Candidate]) -> Table:
    rows: list[Row[Candidate]] = [
        ("ZeRO stage", lambda c: c.stage),
        ("together (GB)", lambda c: _gigabytes(c.bytes_per_gpu)),
        ("fits", lambda c: _yes(c.fits)),
        ("states (GB)", lambda c: _gigabytes(c.states)),
        (_ALIKE, lambda c: _gigabytes(c.states_held_alike)),
        ("largest micro-batch", lambda c: str(c.largest_micro_batch)),
        ("step, one after the other (s)", lambda c: _seconds(c.seconds)),
    ]
    return _table("parallel.tensor", [*map(_size, sizes)], sizes, rows)


def _stages(stages: Mapping[str, Estimate]) -> Table:
    tensor = any(each.traffic.tensor_payload for each in stages.values())
    rows = [
        *_memory_rows([*stages.values()], tensor),
        *_ROWS_OF_FIT,
        *(_ROWS_OF_TENSOR if tensor else ()),
        *_ROWS_OF_TIME,
    ]
    return _table("ZeRO stage", [*stages], [*stages.values()], rows)


def _memory_rows(estimates: Sequence[Estimate], tensor: bool) -> list[Row[Estimate]]:
    """Components that any stage has; below the states the part that is alike, if it can be."""
    memories = [asdict(each.memory) for each in estimates]
    rows: list[Row[Estimate]] = []
    for part in memories[0] if memories else ():
        if any(memory[part] for memory in memories):
            rows.append((f"{part} (GB)", lambda e, p=part: _gigabytes(getattr(e.memory, p))))
        if part == "states" and tensor:
            rows.append((_ALIKE, lambda e: _gigabytes(e.states_held_alike)))
    return rows


def _table(corner: str, heads: Sequence[str], shown: Sequence[Shown], rows: Sequence[Row]) -> Table:
    """A column for each of `shown`."""
    table = Table(corner, *heads)
    for label, cell in rows:
        table.add_row(label, *map(cell, shown))
    return table


def _gigabytes(size: float, digits: int = 2) -> str:
    return f"{size / _GB:.{digits}f}"


def _seconds(time: float) -> str:
    return f"{time:.3f}"


def _yes(so: bool) -> str:
    return "yes" if so else "no"


_ROWS_OF_FIT: tuple[Row[Estimate], ...] = (
    ("together (GB)", lambda e: _gigabytes(e.bytes_per_gpu)),
    ("fits", lambda e: _yes(e.fits)),
    ("largest micro-batch", lambda e: str(e.largest_micro_batch)),
    ("gradients moved (GB)", lambda e: _gigabytes(e.traffic.gradient_payload, 3)),
    ("sent within the node (GB)", lambda e: _gigabytes(e.traffic.within_node, 3)),
    ("sent to other nodes (GB)", lambda e: _gigabytes(e.traffic.between_nodes, 3)),
)
_ROWS_OF_TENSOR: tuple[Row[Estimate], ...] = (
    ("- tensor-parallel, within (GB)", lambda e: _gigabytes(e.traffic.tensor_within_node, 3)),
    ("- tensor-parallel, to others (GB)", lambda e: _gigabytes(e.traffic.tensor_between_nodes, 3)),
    ("tensor-parallel, never overlapped (s)", lambda e: _seconds(e.seconds.tensor)),
)
_ROWS_OF_TIME: tuple[Row[Estimate], ...] = (
    ("computing (s)", lambda e: _seconds(e.seconds.compute)),
    ("communicating (s)", lambda e: _seconds(e.seconds.communication)),
    ("step, overlapped (s)", lambda e: _seconds(e.seconds.overlapped)),
    ("step, one after the other (s)", lambda e: _seconds(e.seconds.serial)),
)
