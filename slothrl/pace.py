"""Whether the host or the device is the slower one: one call measured on both clocks, without waiting for either."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

ENOUGH = 3  # measurements
SLOWER = 1.2  # times the host's time that the device may take for the host to count as the one that is waited for


class Pace:
    """Measurements of one kind of call.

    A device that has nothing else to do waits for the host, and its time for the call is the host's; one that has takes
    the time of its own work. So a device that takes longer than the host is the one that is waited for.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []  # ms of the host, ms of the device
        self._pending: list[tuple[float, Any, Any]] = []

    def watch(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, which gives a CUDA device something to do, measured."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        result = call()
        host = 1e3 * (time.perf_counter() - begin)
        end.record()
        self._pending.append((host, start, end))
        return result

    def waits_for_host(self) -> bool | None:
        """Whether the host is the slower one, by the median; None until enough was measured."""
        done = [pending for pending in self._pending if pending[2].query()]
        self._pending = [pending for pending in self._pending if pending not in done]
        self.samples += [(host, start.elapsed_time(end)) for host, start, end in done]
        if len(self.samples) < ENOUGH:
            return None
        return median(device / host for host, device in self.samples) <= SLOWER

    def __str__(self) -> str:
        host, device = (median(times) for times in zip(*self.samples, strict=True)) if self.samples else (0.0, 0.0)
        return f"{host:.2f} ms of the host, {device:.2f} ms of the device a layer's forward"
