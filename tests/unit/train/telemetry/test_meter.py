"""Throughput against a fake clock, device peaks, and memory."""

from __future__ import annotations

import contextlib
from typing import Literal

import pytest
import torch

from relora_ds.train.telemetry.memory import max_allocated_bytes, restart_peak
from relora_ds.train.telemetry.meter import ThroughputMeter
from relora_ds.train.telemetry.peak import peak_flops


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_rates_cover_the_window_since_the_last_reading() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(1_000, 6e6, 1e9, num_devices=2, clock=clock)
    for _ in range(4):
        clock.now += 5.0
        meter.step()
    # 4,000 tokens in 20 s on two devices of 1 GFLOP/s at 6 MFLOP per token
    assert meter.read() == {
        "throughput/tokens_per_second": pytest.approx(200.0),
        "throughput/mfu": pytest.approx(0.6),
    }
    clock.now += 1.0
    meter.step()
    assert meter.read()["throughput/tokens_per_second"] == pytest.approx(1_000.0)


def test_paused_time_does_not_count_even_when_nested_or_interrupted() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(1_000, 1.0, None, clock=clock)
    clock.now += 2.0
    meter.step()
    with meter.paused():
        clock.now += 50.0
        with meter.paused():
            clock.now += 30.0
    with contextlib.suppress(KeyboardInterrupt), meter.paused():
        clock.now += 20.0
        raise KeyboardInterrupt
    assert meter.read()["throughput/tokens_per_second"] == pytest.approx(500.0)


def test_what_cannot_be_known_is_none() -> None:
    clock = FakeClock()
    meter = ThroughputMeter(1_000, 1.0, None, clock=clock)
    nothing = {"throughput/tokens_per_second": None, "throughput/mfu": None}
    assert meter.read() == nothing
    clock.now += 1.0
    assert meter.read() == nothing
    meter.step()
    assert meter.read() == nothing, "no time has passed"
    clock.now += 1.0
    meter.step()
    assert meter.read() == {"throughput/tokens_per_second": 1_000.0, "throughput/mfu": None}


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1e9, 0.0, -1e9))
    monkeypatch.setattr("time.time", lambda: next(times))
    meter = ThroughputMeter(1_000, 1.0, None)
    meter.step()
    rate = meter.read()["throughput/tokens_per_second"]
    assert rate is not None
    assert rate > 0


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA B300 SXM6 AC", "bf16", 2500.0),
        ("NVIDIA GB300", "bf16", 2500.0),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA GeForce RTX 5090", "bf16", 209.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-PCIE-16GB", "fp32", 14.0),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_peaks(name: str, precision: Literal["bf16", "fp32"], teraflops: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "NVIDIA A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-16GB"],
)
def test_unknown_peaks_are_none(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_host_memory_is_the_peak_of_the_process_in_bytes() -> None:
    block = torch.ones(64 << 20, dtype=torch.uint8)
    peak = max_allocated_bytes("cpu")
    assert block.numel() < peak < 1 << 40
    assert max_allocated_bytes() >= peak


def test_a_peak_of_the_host_cannot_be_restarted() -> None:
    peak = restart_peak(torch.device("cpu"))
    assert peak > 0
    assert max_allocated_bytes("cpu") >= peak


def test_a_peak_of_the_device_is_told_before_it_is_restarted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak = {"bytes": 7}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["bytes"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(bytes=0))
    device = torch.device("cuda", 0)
    assert restart_peak(device) == 7
    assert max_allocated_bytes(device) == 0


@pytest.mark.gpu
def test_device_memory_is_what_tensors_occupied() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = max_allocated_bytes("cuda")
    block = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    assert max_allocated_bytes() - before >= block.numel()
