"""Rules on how one copy of the model is cut over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from relora_ds.config.methods.base import MethodSettings
from relora_ds.config.model import ModelConfig, projection_shapes
from relora_ds.config.reading.document import Finding
from relora_ds.config.rules.training import multiples_near
from relora_ds.config.sections import ParallelConfig, TrainConfig


def heads_divide_over_tensor(
    parallel: ParallelConfig, architecture: ModelConfig
) -> Iterator[Finding]:
    size, keys = parallel.tensor, architecture.num_key_value_heads
    for name, heads in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_key_value_heads", keys),
    ):
        if heads % size:
            possible = [n for n in range(1, keys + 1) if not keys % n]
            yield Finding(
                ("parallel", "tensor"),
                f"is {size}, but must divide the model's {name} ({heads}): a head is not cut; "
                f"write {did_you_mean_number(size, possible)}",
            )
            return


def rank_fits_projections(method: MethodSettings, architecture: ModelConfig) -> Iterator[Finding]:
    shapes = projection_shapes(architecture)
    name = min(shapes, key=lambda projection: min(shapes[projection]))
    rows, columns = shapes[name]
    limit, rank = min(rows, columns), method.low_rank
    if rank is None or rank < limit:
        return
    usual = architecture.hidden_size // 4
    if limit == 1:
        remedy = "no rank is; use method.name=full, or a model with wider layers"
    elif 0 < usual < limit:
        remedy = f"write {limit - 1} or less, {usual} (a quarter of the hidden size) is usual"
    else:
        remedy = f"write {limit - 1} or less"
    yield Finding(
        ("method", "rank"),
        f"is {rank}, but must be less than both sides of every projection, and "
        f"{name.rpartition('.')[2]} is {rows} x {columns}: {remedy}",
    )


def rank_divides_over_tensor(method: MethodSettings, parallel: ParallelConfig) -> Iterator[Finding]:
    rank = method.low_rank
    if parallel.low_rank_plan == "act" and rank is not None and rank % parallel.tensor:
        yield Finding(
            ("parallel", "low_rank_plan"),
            f"is act, which cuts method.rank ({rank}) into parallel.tensor "
            f"({parallel.tensor}) equal parts: use a multiple of {parallel.tensor} as the rank, or "
            "write fold",
        )


def did_you_mean_number(value: int, possible: Sequence[int]) -> str:
    """`4 or 8`: the largest possible number below `value` and the smallest above it."""
    below = [n for n in possible if n < value][-1:]
    above = [n for n in possible if n > value][:1]
    return " or ".join(str(n) for n in (*below, *above))


def tensor_parallelism_is_supported(
    parallel: ParallelConfig, train: TrainConfig
) -> Iterator[Finding]:
    size = parallel.tensor
    if parallel.sequence and size == 1:
        yield Finding(
            ("parallel", "sequence"),
            "is true, but parallel.tensor is 1: a sequence is cut over the processes that share a "
            "model; use false, or a larger parallel.tensor",
        )
    if parallel.sequence and train.seq_length % size:
        yield Finding(
            ("train", "seq_length"),
            f"is {train.seq_length}, but parallel.sequence cuts it into parallel.tensor ({size}) "
            f"equal parts: write {multiples_near(train.seq_length, size)}",
        )
    if parallel.tensor > 1 and train.per_layer_update:
        yield Finding(
            ("train", "per_layer_update"),
            f"is true, but parallel.tensor is {parallel.tensor}: the norm of a parameter's "
            "gradient is not known within the backward pass when it is cut; use one of the two",
        )
