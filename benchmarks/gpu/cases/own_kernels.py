"""Stage B: kernels in Triton against torch's operations on the same device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.gpu.case import Case, CaseSkippedError, Figures, Sizes, synchronize
from relora_ds.methods.sltrain.sparse_linear import SparseComposition
from relora_ds.methods.sltrain.support import draw_support, support_size
from relora_ds.numerics.base_weight import KINDS, Precision
from relora_ds.numerics.batched.draws import RowDraw, UniformRows, draw_rows
from relora_ds.numerics.batched.exchange import Exchange, WeightSlice, absorb
from relora_ds.numerics.batched.fingerprints import fingerprints
from relora_ds.numerics.batched.rows import Rows, clear_rows, copy_rows
from relora_ds.numerics.gpu import launch
from relora_ds.optim.block_adamw import BlockAdamW
from relora_ds.optim.vector_adamw import VectorAdamW, storage_key
from relora_ds.optim.vector_clock import Fragment, VectorClock
from relora_ds.randomness import Stream


def cases() -> list[Case]:
    """All of them; skipped where no kernel runs."""
    functions: list[Callable[[torch.device, Sizes], Figures]] = [
        moved_rows,
        exchanged,
        sparse,
        updated,
        digested,
    ]
    named = [(function.__name__.replace("_", " "), function) for function in functions]
    return [Case("B", f"Triton, {name}", each, expected_s=8, value=9) for name, each in named]


@contextmanager
def _by_torch() -> Iterator[None]:
    before = os.environ.get("RELORA_DS_TRITON")
    os.environ["RELORA_DS_TRITON"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RELORA_DS_TRITON"]
        else:
            os.environ["RELORA_DS_TRITON"] = before


def both(
    device: torch.device, compute: Callable[[torch.device], list[torch.Tensor]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What kernels and what torch's operations make of something.

    Args:
        compute: takes where numbers of rows belong, and returns results.

    Raises:
        CaseSkippedError: no kernel runs there.
    """
    if not launch.usable(device):
        raise CaseSkippedError("kernels in Triton do not run here; a line of the log says why")
    found = compute(torch.device("cpu"))
    synchronize(device)
    with _by_torch():
        return found, compute(device)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    """Bit for bit, also where nothing was written."""
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype, f"{what} {number}: {a.dtype} is not {b.dtype}"
        one, other = (each.contiguous().view(torch.uint8) for each in (a, b))
        differing = int((one != other).sum())
        assert differing == 0, f"{what} {number}: {differing} bytes differ"


def moved_rows(device: torch.device, sizes: Sizes) -> Figures:
    """Rows and columns copied, cleared and drawn, in all types of a switch."""
    length = sizes.pick(37, 5461)
    values = torch.randn(8, length, generator=torch.Generator().manual_seed(1)).to(device)

    def compute(place: torch.device) -> list[torch.Tensor]:
        results = []
        first, second = torch.tensor([6, 0], device=place), torch.tensor([1, 7], device=place)
        for source_type in (torch.float32, torch.bfloat16):
            source = values.to(source_type)
            for target_type in (torch.float32, torch.bfloat16):
                across = torch.full((length, 9), torch.nan, dtype=target_type, device=device)
                along = torch.full((9, length), torch.nan, dtype=target_type, device=device)
                targets = Rows(across.t(), first), Rows(along, second)
                copy_rows([(target, Rows(source, second)) for target in targets], device)
                clear_rows([Rows(along, first), Rows(along.t(), second)], device)
                rows = UniformRows(Stream(3, "candidate_A", "q", 2), 2 * length, 5, length, 0.1)
                which = torch.tensor([[3], [1 << 40]], device=place)
                draw_rows([RowDraw(rows, along[:, : length - 5], which)], device)
                results += [across, along]
        return results

    equal(*both(device, compute), "matrix")
    return {}


def exchanged(device: torch.device, sizes: Sizes) -> Figures:
    """Frozen weights of odd shapes, whole and cut, that make up for exchanges of vectors."""
    rows, cols, count = sizes.pick((37, 67, 3), (2048, 5461, 13))
    generator = torch.Generator().manual_seed(2)
    exact = torch.randn(rows * cols, generator=generator)
    shapes = (2 * count, cols), (2 * count, rows), (count, cols), (count, rows)
    vectors = [torch.randn(shape, generator=generator) for shape in shapes]
    figures: Figures = {}
    kinds: tuple[tuple[Precision, torch.dtype], ...] = (
        ("working", torch.float32),
        ("bf16_residual", torch.bfloat16),
    )
    for name, kind in kinds:
        exchange = Exchange(*(each.to(device, kind) for each in vectors), scale=0.01)

        def compute(
            place: torch.device,
            name: Precision = name,
            kind: torch.dtype = kind,
            exchange: Exchange = exchange,
        ) -> list[torch.Tensor]:
            parts = []
            for start, stop in ((0, rows * cols), (cols + 5, rows * cols - 7)):
                working = torch.empty(stop - start, dtype=kind, device=device)
                base = KINDS[name](working, exact[start:stop].to(device))
                parts.append((WeightSlice(base, working, start), exchange))
            absorb(parts, measured=False)
            return [part.base.load(part.working, 0) for part, _ in parts]

        found, expected = both(device, compute)
        error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        assert error <= 4e-6, f"{name}: off by {error:.2g}"
        equal(found[1:], [found[0][cols + 5 : rows * cols - 7]], f"{name}, cut otherwise:")
        figures[f"{name}_error"] = error
    return figures


def sparse(device: torch.device, sizes: Sizes) -> Figures:
    """The sparse part of a composed weight, and the gradient of its values."""
    rows, cols, rank = sizes.pick((37, 67, 3), (2048, 5461, 128))
    generator = torch.Generator().manual_seed(4)
    count = support_size(rows, cols, 0.03)
    support = [each.to(device) for each in draw_support(1, "q", rows, cols, count)]
    shapes = (rank, cols), (rows, rank), (count,), (rows, cols)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    for kind in (torch.float32, torch.bfloat16):
        lora_a, lora_b, values, slope = (each.to(device, kind) for each in drawn)
        how = SparseComposition(0.25, "dense")

        def compute(
            place: torch.device,
            parts: Sequence[torch.Tensor] = (lora_a, lora_b, values, slope),
            how: SparseComposition = how,
        ) -> list[torch.Tensor]:
            read, *_ = how.of_dense(parts[3], parts[2], *support)
            assert read is not None
            return [how.compose(*parts[:3], *support), read]

        equal(*both(device, compute), f"{kind}, composed and read:")
    return {"elements": count}


def updated(device: torch.device, sizes: Sizes) -> Figures:
    """AdamW of a tensor in which every vector has an age of its own: against the C kernels of the
    host, bit for bit, in fp32 and bf16, with moments in fp32 and in codes."""
    rank, width = sizes.pick((5, 67), (128, 5461))
    size = 2 * rank * width
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(size, generator=generator)
    slopes = [torch.randn(size, generator=generator) for _ in range(3)]
    kinds = (VectorAdamW, torch.float32), (VectorAdamW, torch.bfloat16)
    coded = (BlockAdamW, torch.float32), (BlockAdamW, torch.bfloat16)
    for kind, dtype in (*kinds, *coded):
        ends = []
        for place in (device, torch.device("cpu")):
            p = torch.nn.Parameter(start.to(place, dtype, copy=True))
            optimizer = kind([p], lr=1e-2, weight_decay=0.1)
            rows, columns = VectorClock(rank, 0), VectorClock(rank, 1)
            for clock in (rows, columns):
                clock.restart(-3, torch.arange(0, rank, 2))
                clock.freeze(2, torch.tensor([rank - 1]))
            first = Fragment(0, 0, rank * width, rows, width)
            second = Fragment(0, rank * width, rank * width, columns, rank)
            optimizer.fragments = {storage_key(p): [first, second]}
            optimizer.roundings = {storage_key(p): Stream(1, "rounding", "p")}
            for slope in slopes:
                p.grad = slope.to(place, dtype)
                optimizer.step()
            state = optimizer.state[p].values()
            ends.append([each.detach().cpu().view(-1) for each in (p, *state)])
        if not launch.usable(device):
            raise CaseSkippedError("kernels in Triton do not run here; a line of the log says why")
        equal(ends[0], ends[1], f"{kind.__name__} of {dtype}:")
    return {"elements": size}


def digested(device: torch.device, sizes: Sizes) -> Figures:
    """The digest of many tensors, against torch's operations."""
    generator = torch.Generator().manual_seed(6)
    tensors = []
    for count in (1, 255, 4099, sizes.pick(1 << 15, 1 << 24) + 3):
        values = torch.randn(count, generator=generator)
        for kind in (torch.float32, torch.bfloat16, torch.int8):
            tensors.append(values.to(kind).to(device))

    def compute(place: torch.device) -> list[torch.Tensor]:
        return [torch.stack(fingerprints(tensors))]

    equal(*both(device, compute), "digests")
    return {}
