"""Which device a process takes, and what is refused, as the environment of a GPU machine has it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from relora_ds.config.sections import TrainConfig
from relora_ds.engine import device
from relora_ds.engine.device import (
    check_places,
    communication_backend,
    set_arithmetic,
    take_device,
)
from relora_ds.engine.zero.layout import Layout
from relora_ds.errors import ConfigError

DETERMINISTIC: Any = torch.utils.deterministic
TRAIN = TrainConfig(steps=1, seq_length=8, micro_batch_size=1, global_batch_size=1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with two GPUs; the list of those that were made current."""
    taken: list[int] = []
    monkeypatch.setattr(device, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("LOCAL_RANK", "RELORA_DS_BACKEND", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return taken


@pytest.fixture
def restored() -> Iterator[None]:
    """Global settings of torch as they were."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    filled = DETERMINISTIC.fill_uninitialized_memory
    reduced = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    yield
    torch.use_deterministic_algorithms(False)
    DETERMINISTIC.fill_uninitialized_memory = filled
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    matmul.allow_bf16_reduced_precision_reduction = reduced[0]
    matmul.allow_fp16_reduced_precision_reduction = reduced[1]


def test_a_process_takes_the_gpu_of_its_local_rank(two_gpus: list[int]) -> None:
    assert take_device(1) == torch.device("cuda", 1)
    assert two_gpus == [1]
    with pytest.raises(ConfigError, match=r"process 2 .*wants GPU 2, but only 2 are visible"):
        take_device(2)
    assert two_gpus == [1]


def test_processes_share_gpus_over_gloo(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELORA_DS_BACKEND", "gloo")
    assert communication_backend() == "gloo"
    assert [take_device(rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert two_gpus == [0, 1, 0, 1]
    assert os.environ["LOCAL_RANK"] == "1"  # what DeepSpeed picks its device by


def test_the_accelerator_of_deepspeed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # beside DS_ACCELERATOR=cpu
    assert take_device(3) == torch.device("cpu")
    monkeypatch.setenv("RELORA_DS_BACKEND", "nccl")
    with pytest.raises(ConfigError, match="needs GPUs"):
        communication_backend()
    monkeypatch.setenv("RELORA_DS_BACKEND", "mpi")
    with pytest.raises(ConfigError, match="'mpi'"):
        communication_backend()


@pytest.mark.usefixtures("two_gpus", "restored")
def test_sums_have_a_fixed_order_unless_speed_is_asked_for() -> None:
    torch.set_float32_matmul_precision("high")  # as a container may have it
    set_arithmetic(TRAIN)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not DETERMINISTIC.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    set_arithmetic(TRAIN.model_copy(update={"deterministic": False, "tf32": True}))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("two_gpus", "restored")
def test_a_workspace_of_any_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"':0:0'.*train\.deterministic=false"):
        set_arithmetic(TRAIN)
    set_arithmetic(TRAIN.model_copy(update={"deterministic": False}))


def _layout(owner: str, working: str) -> Layout:
    """Masters and working weights on a device each; `meta` stands for a GPU."""
    found: Any = SimpleNamespace(
        owners=lambda: iter([torch.empty(1, device=owner)]),
        working=lambda weight: (0, torch.empty(1, device=working)),
    )
    return cast(Layout, found)


def test_the_optimizer_of_the_host_needs_its_states_there() -> None:
    weight = nn.Parameter(torch.empty(1, device="meta"))
    check_places("cpu_adam", _layout("cpu", "meta"), [weight])
    check_places("adamw", _layout("meta", "meta"), [weight])
    with pytest.raises(ConfigError, match="offload_optimizer"):
        check_places("cpu_adam", _layout("meta", "meta"), [weight])


def test_weights_on_the_host_are_not_edited_from_a_gpu() -> None:
    weight = nn.Parameter(torch.empty(1, device="meta"))
    check_places("adamw", _layout("cpu", "cpu"), [])
    with pytest.raises(ConfigError, match="offload_param"):
        check_places("adamw", _layout("cpu", "cpu"), [weight])


_TWICE = """
import resource, torch
from relora_ds.engine.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [torch.ones(3 << 20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_host_keeps_what_a_step_frees() -> None:
    """In a process of its own: what others allocated before decides where blocks fit."""
    end = subprocess.run([sys.executable, "-c", _TWICE], capture_output=True, text=True, check=True)
    _, second = map(int, end.stdout.split())
    pages = 3 * 4 * (12 << 20) // resource.getpagesize()
    assert second < pages / 10
