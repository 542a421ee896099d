"""Kernels in Triton, interpreted on the CPU, against the torch paths whose place they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ds.methods.sltrain.sparse_linear import SparseComposition
from relora_ds.numerics.base_weight import KINDS, Precision
from relora_ds.numerics.batched.draws import RowDraw, UniformRows, draw_rows
from relora_ds.numerics.batched.exchange import Exchange, WeightSlice, absorb
from relora_ds.numerics.batched.fingerprints import fingerprints
from relora_ds.numerics.batched.rows import Rows, clear_rows, copy_rows
from relora_ds.randomness import Stream
from tests.harness.kernels import REASON, VARIANTS, interpreted

CPU = torch.device("cpu")
BOTH = [torch.float32, torch.bfloat16]
__all__ = ["interpreted"]


def by_torch_and_by_kernel(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Any]
) -> tuple[Any, Any]:
    """What torch's operations and what kernels make of one thing."""
    by_kernel = compute()
    monkeypatch.setenv("RELORA_DS_TRITON", "0")
    return compute(), by_kernel


def poisoned(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory in which whatever was not written shows."""
    return torch.full(shape, torch.nan if kind.is_floating_point else 77, dtype=kind)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, also where nothing was written."""
    assert found.dtype == expected.dtype
    both = [each.contiguous().view(torch.uint8) for each in (found, expected)]
    return torch.equal(*both)


@pytest.mark.parametrize("source_type", BOTH)
@pytest.mark.parametrize("target_type", BOTH)
@pytest.mark.parametrize("length", [1, 7, 1025])
def test_rows_and_columns_are_copied(
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
    source_type: torch.dtype,
    target_type: torch.dtype,
    length: int,
) -> None:
    values = torch.randn(6, length, generator=torch.Generator().manual_seed(1)).to(source_type)
    values[0, 0] = torch.inf

    def copied() -> torch.Tensor:
        out, flat = poisoned(length, 9, kind=target_type), poisoned(5 * length, kind=target_type)
        numbers = [torch.tensor(each) for each in ([8, 0], [5, 0], [3], [2], [1, 4], [4, 3])]
        columns, rows = out.t(), flat.view(5, length)
        copy_rows(
            [
                (Rows(columns, numbers[0]), Rows(values, numbers[1])),
                (Rows(columns, numbers[2]), Rows(values, numbers[3])),
                (Rows(rows, numbers[4]), Rows(values, numbers[5])),
            ],
            CPU,
        )
        return torch.cat([out.view(-1), flat])

    by_torch, by_kernel = by_torch_and_by_kernel(monkeypatch, copied)
    assert equal(by_kernel, by_torch)
    assert int(by_kernel.isnan().sum()) == (6 + 3) * length


def test_nothing_to_copy_is_no_launch(interpreted: None) -> None:
    empty = Rows(torch.zeros(3, 4), torch.empty(0, dtype=torch.int64))
    copy_rows([(empty, empty)], CPU)
    copy_rows([], CPU)
    clear_rows([], CPU)


def test_rows_of_all_types_are_cleared(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = torch.float32, torch.bfloat16, torch.int8, torch.uint8

    def cleared() -> list[torch.Tensor]:
        matrices = [poisoned(5, 1030, kind=kind) for kind in kinds]
        across = Rows(matrices[0].t(), torch.tensor([1029, 3]))
        clear_rows([across, *(Rows(each, torch.tensor([4, 1])) for each in matrices)], CPU)
        return matrices

    for expected, found in zip(*by_torch_and_by_kernel(monkeypatch, cleared), strict=True):
        assert equal(found, expected)
        assert not found[[1, 4]].any()
        assert found[[0, 2, 3], 5].ne(0).all()


@pytest.mark.parametrize("kind", BOTH)
def test_draws_are_those_of_the_stream(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, kind: torch.dtype
) -> None:
    def drawn() -> torch.Tensor:
        out = poisoned(4, 520, kind=kind)
        rows = UniformRows(Stream(3, "candidate_A", "q", 2), 600, 41, 561, 0.123)
        far = torch.tensor([[3, 0], [1 << 40, 5]])
        narrow = UniformRows(Stream(4, "candidate_B", "k"), 3, 0, 3, 2.0)
        parts = [RowDraw(rows, out, far), RowDraw(narrow, out[:, 7:10], torch.tensor([[2], [9]]))]
        draw_rows(parts, CPU)
        return out

    by_torch, by_kernel = by_torch_and_by_kernel(monkeypatch, drawn)
    assert equal(by_kernel, by_torch)
    assert int(by_kernel.isnan().sum()) == 2 * 520 - 3


STORES: list[tuple[Precision, torch.dtype]] = [
    ("working", torch.float32),
    ("working", torch.bfloat16),
    ("bf16_residual", torch.bfloat16),
    ("fp32", torch.bfloat16),
]
ROWS, COLS = 37, 131
_SLICES = [(0, ROWS * COLS), (17, ROWS * COLS - 50), (3 * COLS, 4 * COLS), (5, 9), (300, 300)]


def an_exchange(kind: torch.dtype, rows: int, cols: int, count: int) -> Exchange:
    generator = torch.Generator().manual_seed(count)
    shapes = (2 * count, cols), (2 * count, rows), (count, cols), (count, rows)
    vectors = [torch.randn(shape, generator=generator).to(kind) for shape in shapes]
    return Exchange(*vectors, scale=0.37)


@pytest.mark.parametrize("count", [1, 5, 13])
@pytest.mark.parametrize(("precision", "kind"), STORES)
def test_weights_absorb_an_exchange(
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    kind: torch.dtype,
    count: int,
) -> None:
    """All slices and another weight at once, and nothing beside them is written."""
    weight = torch.randn(ROWS * COLS, generator=torch.Generator().manual_seed(0))
    exchange, other = an_exchange(kind, ROWS, COLS, count), an_exchange(kind, 2, 40, 3)

    def edited() -> list[torch.Tensor]:
        parts, found = [], []
        for start, stop, change in [*((a, b, exchange) for a, b in _SLICES), (0, 80, other)]:
            room = poisoned(stop - start + 2, kind=kind)
            working = room[1:-1]
            base = KINDS[precision](working, weight[start:stop].clone())
            parts.append((WeightSlice(base, working, start), change))
            found += [room, *base.tensors().values()]
        assert absorb(parts, measured=False) is None
        exact = [part.base.load(part.working, 0) for part, _ in parts]
        assert all(room[0].isnan() and room[-1].isnan() for room in found if room.dtype == kind)
        return exact

    by_torch, by_kernel = by_torch_and_by_kernel(monkeypatch, edited)
    unit = 2.0**-8 if (precision, kind) == STORES[1] else 2.0**-22
    for expected, found in zip(by_torch, by_kernel, strict=True):
        torch.testing.assert_close(found, expected, rtol=unit, atol=8 * unit)
    whole = by_kernel[0]
    for (start, stop), found in zip(_SLICES, by_kernel[:-1], strict=True):
        assert equal(found, whole[start:stop]), "an element depends on how the weight is cut"


def test_a_measured_exchange_reports_what_was_stored(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = an_exchange(torch.bfloat16, ROWS, COLS, 4)

    def measured() -> torch.Tensor:
        working = torch.empty(ROWS * COLS, dtype=torch.bfloat16)
        base = KINDS["bf16_residual"](working, torch.linspace(-1, 1, ROWS * COLS))
        sums = absorb([(WeightSlice(base, working, 0), exchange)] * 1, measured=True)
        assert sums is not None
        return sums[0]

    by_torch, by_kernel = by_torch_and_by_kernel(monkeypatch, measured)
    torch.testing.assert_close(by_kernel[[0, 2, 3]], by_torch[[0, 2, 3]], rtol=1e-5, atol=0.0)
    assert 0.0 < float(by_kernel[1]) < 1e-8 * float(by_kernel[2])


def test_an_exchange_moves_eight_bytes_an_element(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the working weight and two of its residual, each read and written once."""
    from triton.runtime.interpreter import InterpreterBuilder

    working = torch.empty(ROWS * COLS, dtype=torch.bfloat16)
    base = KINDS["bf16_residual"](working, torch.zeros(ROWS * COLS))
    ranges = [
        (each.data_ptr(), each.data_ptr() + each.numel() * each.element_size())
        for each in (working, *base.tensors().values())
    ]
    moved = 0

    def counted(name: str, mask_at: int) -> None:
        original = getattr(InterpreterBuilder, name)

        def count(self: Any, pointers: Any, *rest: Any) -> Any:
            nonlocal moved
            size = pointers.get_element_ty().primitive_bitwidth // 8
            for first, end in ranges:
                at = pointers.data.astype("int64")
                moved += size * int(((at >= first) & (at < end) & rest[mask_at].data).sum())
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, count)

    counted("create_masked_load", 0)
    counted("create_masked_store", 1)
    exchange = an_exchange(torch.bfloat16, ROWS, COLS, 6)
    absorb([(WeightSlice(base, working, 0), exchange)], measured=False)
    assert moved == 8 * working.numel()


@pytest.mark.parametrize("narrow", [torch.int16, torch.int32])
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("behind", [0, 3])
def test_a_sparse_part_is_added_and_its_gradient_read(
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: torch.dtype,
    narrow: torch.dtype,
    behind: int,
) -> None:
    """Rows without elements, full ones, and one of more than a block; dense matrices of the same
    shape, and with rows and columns behind the sparse ones."""
    rows, cols, rank = 5, 300, 3
    counts = torch.tensor([0, 1, 300, 129, 0])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    generator = torch.Generator().manual_seed(3)
    chosen = [torch.randperm(cols, generator=generator)[:count].sort().values for count in counts]
    columns = torch.cat(chosen).to(narrow)
    high, wide = rows + behind, cols + behind
    shapes = (rank, wide), (high, rank), (len(columns),), (high, wide)
    lora_a, lora_b, values, slope = (
        torch.randn(shape, generator=generator).to(kind) for shape in shapes
    )

    def composed() -> list[torch.Tensor]:
        how = SparseComposition(0.3, "dense")
        parts = values, starts, columns
        (read, *_) = how.of_dense(slope, *parts)
        assert read is not None
        return [how.compose(lora_a, lora_b, *parts), read]

    by_torch, by_kernel = by_torch_and_by_kernel(monkeypatch, composed)
    for found, expected in zip(by_kernel, by_torch, strict=True):
        assert equal(found, expected)
    assert by_kernel[0].ne(0.3 * lora_b @ lora_a).any()


def test_fingerprints_are_the_same_64_bits(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of all widths together: empty, shorter than a row, of several, and misaligned."""
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for kind, count in (
        (torch.bfloat16, 2 * 4 * 4096 + 77),
        (torch.int8, 8 * 4096 + 3),
        (torch.float32, 4097 * 2),
        (torch.int64, 4096),
        (torch.bfloat16, 5),
        (torch.uint8, 0),
        (torch.bool, 9),
        (torch.int16, 4 * 4096),
    ):
        drawn = torch.randint(-128, 128, (8 * count + 8,), generator=generator, dtype=torch.int8)
        words = drawn[: kind.itemsize * count].view(kind) if kind != torch.bool else drawn[:9] > 0
        tensors.append(words)
    tensors += [tensors[0][1:], tensors[2].view(2, -1).t()]
    by_torch, by_kernel = by_torch_and_by_kernel(monkeypatch, lambda: fingerprints(tensors))
    assert [int(value) for value in by_kernel] == [int(value) for value in by_torch]
    assert len({int(value) for value in by_kernel}) == len(tensors)
    changed = tensors[0].clone()
    changed.view(torch.int16)[20000] ^= 1
    assert int(fingerprints([changed])[0]) != int(by_torch[0])


LIMITS: dict[str, tuple[int, int]] = {
    "copy rows": (40, 0),
    "clear rows": (32, 0),
    "draw rows": (32, 0),
    "add at the support": (40, 0),
    "read at the support": (40, 0),
    "fingerprints, bf16": (64, 512),
    "factors of vectors": (32, 0),
    "adamw, fp32": (80, 4096),
    "adamw, bf16": (80, 4096),
    "adamw, codes, fp32": (96, 4096),
    "adamw, codes, bf16": (96, 4096),
    "absorb, fp32": (128, 8192),
    "absorb, bf16 and residual": (128, 8192),
    "absorb, bf16 and fp32": (128, 8192),
}
"""Registers of a thread and bytes of shared memory, at most. None may be spilled."""


LARGEST = ["add at the support", "adamw, codes, bf16", "absorb, bf16 and residual"]


@pytest.mark.parametrize(
    ("kernels", "targets"),
    [(LARGEST, ["90"]), pytest.param(list(VARIANTS), ["80", "90", "100"], marks=pytest.mark.slow)],
    ids=["the largest", "all"],
)
def test_kernels_fit_into_registers(kernels: list[str], targets: list[str], tmp_path: Path) -> None:
    pytest.importorskip("triton", reason=REASON)
    command = [sys.executable, "-m", "tests.harness.kernels", *kernels, *targets]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert set(LIMITS) == set(VARIANTS) >= set(taken) == set(kernels)
    for name, by_target in taken.items():
        assert set(by_target) == set(targets)
        for registers, stack, shared in by_target.values():
            assert stack == 0, f"{name} spills {stack} bytes"
            assert registers <= LIMITS[name][0], f"{name} takes {registers} registers"
            assert shared <= LIMITS[name][1], f"{name} takes {shared} bytes of shared memory"
