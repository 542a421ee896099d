"""The C kernel of the per-vector update: its numbers, its slices, and what happens without it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from relora_ds.numerics.host import kernels as host_kernels
from relora_ds.optim import vector_block
from relora_ds.optim.vector_block import Rectangle, Tensors, update_blocks

ROWS, COLS, AT, BETAS = 37, 53, 11, (0.9, 0.999)


def tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    p, grad, first, second = torch.randn(4, AT + ROWS * COLS + 5, generator=generator).to(dtype)
    return Tensors(p.clone(), grad.clone(), first.clone() * 1e-2, second.square() * 1e-3)


def factors(count: int) -> torch.Tensor:
    """Some vectors frozen, all of different ages."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.rand(4, count, generator=generator) + 0.5
    numbers[0], numbers[1] = 1.0, 0.99
    numbers[:, ::7] = torch.tensor([0.0, 1.0, 1.0, torch.inf]).unsqueeze(1)
    return numbers


@pytest.mark.parametrize("axis", [0, 1])
def test_the_kernel_computes_what_float64_does(axis: int) -> None:
    exact, found, own = tensors(torch.float64), tensors(), factors((ROWS, COLS)[axis])
    before = tensors()
    update_blocks(exact, [Rectangle(AT, ROWS, COLS, axis, 0)], own.double(), BETAS)
    update_blocks(found, [Rectangle(AT, ROWS, COLS, axis, 0)], own, BETAS)
    for name, value, expected, old in zip(Tensors._fields, found, exact, before, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        outside = torch.ones_like(value, dtype=torch.bool)
        outside[AT : AT + ROWS * COLS] = False
        assert torch.equal(value[outside], old[outside])
    still = (found.p == before.p)[AT : AT + ROWS * COLS].view(ROWS, COLS)
    assert bool((still if axis == 0 else still.t())[::7].all())


@pytest.mark.parametrize("axis", [0, 1])
def test_every_slice_and_number_of_threads_gives_the_same_bits(
    axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = factors((ROWS, COLS)[axis])
    expected = tensors()
    update_blocks(expected, [Rectangle(AT, ROWS, COLS, axis, 0)], own, BETAS)
    for cut in (1, 5, 36):
        found = tensors()
        blocks = [
            Rectangle(AT + first * COLS, stop - first, COLS, axis, 0 if axis else first)
            for first, stop in ((0, cut), (cut, ROWS))
        ]
        update_blocks(found, blocks, own, BETAS)
        assert all(map(torch.equal, found, expected))
    monkeypatch.setattr(host_kernels, "_SHARED_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = tensors()
    update_blocks(found, [Rectangle(AT, ROWS, COLS, axis, 0)], own, BETAS)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("axis", [0, 1])
def test_without_a_compiler_the_operations_give_the_same_bits(
    axis: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, found, own = tensors(), tensors(), factors((ROWS, COLS)[axis])
    block = Rectangle(AT, ROWS, COLS, axis, 0)
    for _ in range(3):
        update_blocks(expected, [block], own, BETAS)
    monkeypatch.setenv("CC", "/nonexistent/cc")
    host_kernels.load_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                update_blocks(found, [block], own, BETAS)
    finally:
        host_kernels.load_kernels.cache_clear()
    assert "install a C compiler or set CC" in caplog.text
    assert all(map(torch.equal, found, expected))


def test_a_compiler_is_called_with_all_words_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `ccache gcc`, or of `gcc -m64`."""
    source = min(Path(host_kernels.__file__).parents[1].rglob("*.c"), key=os.path.getsize)
    monkeypatch.setenv("CC", "env cc -DNOTHING='a b'")
    assert host_kernels.load_kernels.__wrapped__(source) is not None


@pytest.mark.parametrize("problem", [FailOnRecompileLimitHit, TorchDynamoException])
def test_what_cannot_be_compiled_is_run_as_it_is(
    problem: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 0

    def compile_nothing(step: Callable[..., None], **options: Any) -> Callable[..., None]:
        def fail(*arguments: Any) -> None:
            nonlocal asked
            asked += 1
            raise problem("no kernel")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    vector_block._compiled.cache_clear()
    try:
        step, plain = vector_block._compiled(), cast(Callable[..., None], vector_block._step)
        own = factors(ROWS).unsqueeze(2).unbind()
        found, expected = ([t[: ROWS * COLS].view(ROWS, COLS) for t in tensors()] for _ in range(2))
        for _ in range(2):
            step(*found, *own, *BETAS)
            plain(*expected, *own, *BETAS)
    finally:
        vector_block._compiled.cache_clear()
    assert asked == 1
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))
    assert caplog.messages.count(caplog.messages[0]) == 1
    assert "no kernel" in caplog.text
