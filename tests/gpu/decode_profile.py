"""Where a decoding step's time goes: kernel by kernel, and how long the GPU waits.

All by the difference of two lengths, so that prefill and what comes once a call is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

SHORT, LONG = 9, 41  # tokens
STEPS = LONG - SHORT
PAUSE = 20.0  # us; longer gaps are the host's: between steps, or where something is not in a graph


@dataclass
class Trace:
    """What the GPU did during a call, us. busy: at least one kernel ran, so launches that overlap count once."""

    wall: float = 0.0
    busy: float = 0.0
    gaps: float = 0.0
    pauses: float = 0.0
    pause_count: int = 0
    kernels: dict[str, tuple[float, int]] = field(default_factory=dict)  # time of its own, and launches


def trace_of(events: Iterable[tuple[str, float, float]], wall: float = 0.0) -> Trace:
    """events: name, begin and end of each kernel and copy, us, in any order."""
    found, last = Trace(wall), None
    for name, begin, end in sorted(events, key=lambda event: event[1:]):
        taken, count = found.kernels.get(name, (0.0, 0))
        found.kernels[name] = (taken + end - begin, count + 1)
        if last is None:
            last = begin
        gap = begin - last
        if gap > PAUSE:
            found.pauses += gap
            found.pause_count += 1
        elif gap > 0:
            found.gaps += gap
        found.busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    return found


def traced(call: Callable[[], float]) -> Trace:
    """call: returns its seconds."""
    import torch
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        wall = call() * 1e6
        torch.cuda.synchronize()
    events = [e for e in record.events() or () if e.device_type == DeviceType.CUDA]  # pyright: ignore
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return trace_of(((e.name, e.time_range.start, e.time_range.end) for e in events), wall)


def profile(count: int, seconds: Callable[[int, int], float]) -> dict[str, Any]:
    """Prints a step's kernels and the GPU's idle time; seconds: of so many sequences and tokens.

    Returns:
        ms a step: "wall" without and "traced" with the profiler, "busy", "idle" (wall less busy), and of the trace
        "gaps" up to 20 us, longer "pauses" and how many of these a step has.
    """
    wall = (min(seconds(count, LONG) for _ in range(3)) - min(seconds(count, SHORT) for _ in range(3))) * 1e6
    traced(lambda: seconds(count, 2))  # the profiler's own start
    short, long = (traced(lambda tokens=tokens: seconds(count, tokens)) for tokens in (SHORT, LONG))
    found = step_of(short, long, wall)
    print(f"PROFILE {count} sequences: {said(found)}")
    for name, (taken, launches) in kernels_of(short, long)[:26]:
        print(f"PROFILE   {taken:7.3f} ms {launches:6.1f} x {name[:90]}", flush=True)
    return found


def step_of(short: Trace, long: Trace, wall: float) -> dict[str, float]:
    """What a step took, ms, by the difference of two traces; wall: the difference without the profiler, us."""
    names = ("wall", "busy", "gaps", "pauses")
    taken, busy, gaps, pauses = ((getattr(long, name) - getattr(short, name)) / STEPS / 1e3 for name in names)
    found = {"traced": taken, "busy": busy, "gaps": gaps, "pauses": pauses}
    found["pause_count"] = (long.pause_count - short.pause_count) / STEPS
    return {"wall": wall / STEPS / 1e3, "idle": wall / STEPS / 1e3 - busy, **found}


def kernels_of(short: Trace, long: Trace) -> list[tuple[str, tuple[float, float]]]:
    """Each kernel's ms and launches a step, those with most time first."""
    zero = (0.0, 0)
    steps = {}
    for name, (taken, count) in long.kernels.items():
        before = short.kernels.get(name, zero)
        steps[name] = ((taken - before[0]) / STEPS / 1e3, (count - before[1]) / STEPS)
    return sorted(steps.items(), key=lambda item: -item[1][0])


def said(found: dict[str, float]) -> str:
    """A step in one line."""
    return (
        f"{found['wall']:.2f} ms a step ({found['traced']:.2f} profiled), GPU busy {found['busy']:.2f}, idle "
        f"{found['idle']:.2f}; in the profile {found['gaps']:.2f} in gaps up to {PAUSE:.0f} us, {found['pauses']:.2f} "
        f"in {found['pause_count']:.1f} longer ones"
    )
