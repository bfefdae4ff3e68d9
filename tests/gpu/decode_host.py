"""Where the host's time of a decoding step goes, function by function."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path

from tests.gpu.decode_profile import LONG, SHORT, STEPS

SHOWN = 24
Times = dict[str, tuple[float, float]]  # of a function: s of its own, s with what it calls


def host_profile(count: int, seconds: Callable[[int, int], float]) -> list[tuple[str, float, float]]:
    """Prints and returns `step_of` the functions that run; seconds: of so many sequences and tokens."""
    short, long = (profiled(lambda tokens=tokens: seconds(count, tokens)) for tokens in (SHORT, LONG))
    found = step_of(short, long)[:SHOWN]
    print(f"HOST {count} sequences: ms a step of its own, with what it calls")
    for name, own, whole in found:
        print(f"HOST   {own:7.3f} {whole:7.3f} {name}", flush=True)
    return found


def step_of(short: Times, long: Times) -> list[tuple[str, float, float]]:
    """(function, ms of its own, ms with what it calls) a step, by the difference of two lengths, the longest first.

    The profiler's own time is in it: it doubles what is made of many short calls, so compare, and do not add up.
    """
    found = []
    for name, (own, whole) in long.items():
        before = short.get(name, (0.0, 0.0))
        found.append((name, (own - before[0]) / STEPS * 1e3, (whole - before[1]) / STEPS * 1e3))
    return sorted(found, key=lambda item: -item[1])


def profiled(call: Callable[[], object]) -> Times:
    """Of this thread."""
    record = cProfile.Profile()
    record.runcall(call)
    stats = pstats.Stats(record).stats  # pyright: ignore
    found: Times = {}
    for (file, line, function), (_, _, own, whole, _) in stats.items():
        name = f"{Path(file).name}:{line}({function})" if line else function
        before = found.get(name, (0.0, 0.0))
        found[name] = (before[0] + own, before[1] + whole)
    return found
