"""Where a call's time goes on the GPU: kernels by their share, and how much of the wall clock the GPU was busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Profile:
    """torch's profiler between `start` and `stop`, which gives lines of text in milliseconds; it slows the host."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self.record = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.record.start()
        self.begin = time.perf_counter()

    def stop(self, kernels: int = 24) -> list[str]:
        torch.cuda.synchronize()
        wall = time.perf_counter() - self.begin
        self.record.stop()
        events = sorted(self.record.key_averages(), key=lambda event: -event.self_device_time_total)
        busy, count = sum(event.self_device_time_total for event in events), sum(event.count for event in events)
        lines = [f"{wall * 1e3:.1f} ms, GPU busy {busy / 1e3:.1f} ms, {count} kernels and copies"]
        for event in events[:kernels]:
            lines.append(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} x {event.key[:110]}")
        return lines


def profile_lines(call: Callable[[], Any]) -> list[str]:
    """One call's profile."""
    profile = Profile()
    profile.start()
    call()
    return profile.stop()
