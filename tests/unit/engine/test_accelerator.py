"""A machine whose GPUs torch cannot use is refused, and its driver is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from relora_ds.engine import accelerator
from relora_ds.errors import ConfigError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is all of PATH, on a machine without GPUs whose torch is a CUDA build."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(accelerator, "_KERNEL_MODULE", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    accelerator.driver_version.cache_clear()
    yield tmp_path
    accelerator.driver_version.cache_clear()


def _nvidia_smi(folder: Path, text: str) -> None:
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + text)
    (folder / "nvidia-smi").chmod(0o755)


_TWO = 'if [ "$1" = -L ]; then echo "GPU 0: H100"; echo "GPU 1: H100"; else echo 535.104.05; fi\n'


def test_an_old_driver_is_an_error_and_never_a_run_on_the_cpu(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _nvidia_smi(machine, _TWO)
    with pytest.raises(ConfigError) as error:
        accelerator.check_accelerator()
    text = str(error.value)
    assert text.startswith("nvidia-smi lists 2 GPUs (driver 535.104.05), but torch ")
    assert "for CUDA 13.0 sees none: that driver is too old" in text
    assert "TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126" in text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES='7': unset it"):
        accelerator.check_accelerator()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="is a build for CPUs"):
        accelerator.check_accelerator()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    accelerator.check_accelerator()


@pytest.mark.parametrize("text", ["exit 9\n", "echo 'No devices were found'\n", "exec sleep 60\n"])
def test_a_machine_without_gpus_computes_on_its_cpu(
    machine: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "_PATIENCE_S", 0.2)
    accelerator.check_accelerator()
    _nvidia_smi(machine, text.replace("sleep", "/bin/sleep"))
    accelerator.check_accelerator()


def test_the_driver_is_told_by_the_kernel_first(machine: Path) -> None:
    assert accelerator.driver_version() is None
    accelerator.driver_version.cache_clear()
    _nvidia_smi(machine, _TWO)
    assert accelerator.driver_version() == "535.104.05"
    accelerator.driver_version.cache_clear()
    (machine / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
        "GCC version:  gcc version 13.3.0\n"
    )
    assert accelerator.driver_version() == "580.95.05"
    line = accelerator.describe_machine(torch.device("cpu"))
    assert line.endswith(", CUDA 13.0, driver 580.95.05")


@pytest.mark.usefixtures("machine")
def test_the_machine_is_described_by_the_device_that_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert accelerator.describe_machine(torch.device("cuda", 1)).startswith("GPU 1, torch ")
    assert accelerator.describe_machine(torch.device("cpu")).startswith("CPU (")
