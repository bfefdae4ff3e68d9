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
        lines += idle_lines(device_intervals(self.record), wall * 1e6)
        for event in events[:kernels]:
            lines.append(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} x {event.key[:110]}")
        return lines


def device_intervals(record: Any) -> list[tuple[float, float, str]]:
    """(start, end, name) of what ran on the device, in microseconds, as it began; copies are not counted."""
    cuda = torch.autograd.DeviceType.CUDA  # pyright: ignore
    events = [e for e in record.events() if e.device_type == cuda and not getattr(e, "is_user_annotation", False)]
    found = [(event.time_range.start, event.time_range.end, event.name) for event in events]
    return sorted(interval for interval in found if not interval[2].startswith("Memcpy"))


def idle_lines(intervals: list[tuple[float, float, str]], wall: float) -> list[str]:
    """Where the device waits: in all, in each tenth of the time from its first kernel to its last, the longest waits.

    intervals: sorted by their start, in microseconds, which may overlap (several streams); wall: of the call, the same.
    """
    if not intervals:
        return []
    begin, end = intervals[0][0], max(stop for _, stop, _ in intervals)
    gaps, reached, before = [], begin, "the start"
    for start, stop, name in intervals:
        if start > reached:
            gaps.append((start - reached, reached, before, name))
        if stop >= reached:
            reached, before = stop, name
    tenths = [0.0] * 10
    for length, at, _, _ in gaps:
        tenths[min(9, int(10 * (at - begin) / (end - begin)))] += length
    idle = sum(gap[0] for gap in gaps)
    lines = [
        f"{idle / 1e3:.1f} ms idle between kernels, by tenths {' '.join(f'{t / 1e3:.1f}' for t in tenths)}; "
        f"{(wall - (end - begin)) / 1e3:.1f} ms before the first and after the last"
    ]
    for length, at, left, right in sorted(gaps, reverse=True)[:6]:
        lines.append(f"{length / 1e3:9.2f} ms idle at {(at - begin) / 1e3:.0f} ms, {left[:50]} -> {right[:50]}")
    return lines


def profile_lines(call: Callable[[], Any]) -> list[str]:
    """One call's profile."""
    profile = Profile()
    profile.start()
    call()
    return profile.stop()
