"""Tokens per second and model FLOPs utilisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ThroughputMeter:
    """Measures the rate of training between two readings.

    It reads a monotonic clock, so that a corrected wall clock cannot distort it, and never waits
    for the device: over a window that ends where the loss is read, host time is device time.

    Args:
        tokens_per_step: tokens of one optimizer step over all processes.
        flops_per_token: forward and backward FLOPs that the model needs per token, without what
            activation checkpointing recomputes.
        device_peak_flops: peak of one device in FLOP/s, None where it is not known.
        num_devices: devices that share the work.
        clock: seconds from a monotonic clock.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: float,
        device_peak_flops: float | None,
        *,
        num_devices: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = None if device_peak_flops is None else device_peak_flops * num_devices
        self._clock = clock
        self._pauses = 0
        self._restart()

    def step(self) -> None:
        """Count one finished optimizer step."""
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside, such as that of an evaluation or a checkpoint. May nest."""
        self._pauses += 1
        started = self._clock()
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                self._paused_s += self._clock() - started

    def read(self) -> dict[str, float | None]:
        """Rates since the last reading, which start the next window; None where nothing ran.

        Returns:
            ``throughput/tokens_per_second`` over all processes, and ``throughput/mfu`` as a share
            of the devices' peak (0 to 1), None where the peak is not known.
        """
        assert self._pauses == 0, "a reading inside a pause would count the pause as training"
        elapsed_s = self._clock() - self._started - self._paused_s
        tokens = self._steps * self._tokens_per_step
        self._restart()
        rate = tokens / elapsed_s if tokens and elapsed_s > 0 else None
        mfu = None
        if rate is not None and self._peak_flops is not None:
            mfu = rate * self._flops_per_token / self._peak_flops
        return {"throughput/tokens_per_second": rate, "throughput/mfu": mfu}

    def _restart(self) -> None:
        self._steps = 0
        self._paused_s = 0.0
        self._started = self._clock()
