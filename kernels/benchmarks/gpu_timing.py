"""How long a call takes: on the GPU alone, by replays of a CUDA graph of it, and as its caller sees it.

Where the host launches more slowly than the GPU works, events around a call measure the host. A graph's replay does
what the call told the GPU to do and nothing else, so every arm of a comparison that can be captured is, by one rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from slothrl_kernels.layer_recorder import CudaGraphs

REPLAYS = 25
FLUSH = 2**29  # bytes written before each replay: they push everything out of the L2 cache, and cover the host's delay


class Timing(NamedTuple):
    """gpu: ms of a replay; None: it was not captured, and `why` says what the first error was. wall: ms between events
    around a plain call, or of the clock on a CPU. peak: MiB beyond what was there before."""

    gpu: float | None
    wall: float
    peak: float
    why: str = ""

    @property
    def ms(self) -> float:
        """What is compared: the GPU's time where there is one."""
        return self.wall if self.gpu is None else self.gpu

    def cell(self, base: Timing | None = None) -> str:
        """`1.234 (1.05x; wall 2.345; 67 MiB)`: times base by the GPU's time, where both were captured."""
        same = base is not None and (base.gpu is None) == (self.gpu is None)
        parts = [f"{self.ms / base.ms:.2f}x"] if base is not None and same else []
        parts += [] if self.gpu is None else [f"wall {self.wall:.3f}"]
        parts += ["not captured"] if self.why else []
        return f"{self.ms:.3f} ({'; '.join([*parts, f'{self.peak:.0f} MiB'])})"


class Prepared(NamedTuple):
    """A call before it is timed: `wall`, `peak`, `why` as of `Timing`; what replays it, where it was captured."""

    wall: float
    peak: float
    replay: Callable[[], None] | None = None
    why: str = ""


def prepare(call: Callable[[], Any], right: Callable[[Any], bool] = lambda _: True) -> Prepared:
    """A call whose results `right` accepts; a replay that does not write them is no measurement."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return Prepared((time.perf_counter() - start) * 1e3, 0.0)
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    wall: Any = do_bench(call, warmup=20, rep=100, return_mode="median")
    try:
        return Prepared(wall, peak, captured(call, right))
    except Exception as error:
        torch.cuda.synchronize()
        return Prepared(wall, peak, None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")


def captured(call: Callable[[], Any], right: Callable[[Any], bool]) -> Callable[[], None]:
    """What replays the call.

    Raises:
        RuntimeError: a replay does not write the results: something ran on a stream that was not captured.
        Whatever capturing raises.
    """
    recorder, results = CudaGraphs(), []
    recorder.begin()

    def run() -> None:
        results[:] = call()

    replay = recorder.record(run)
    with torch.no_grad():
        for tensor in results:
            tensor.detach().zero_()
    replay()
    if not right(results):
        raise RuntimeError("a replay does not give the call's results")

    def again(held: tuple = (recorder, run)) -> None:  # the recording's own memory, and what it reads
        replay()

    return again


def timed(prepared: dict[str, Prepared]) -> dict[str, Timing]:
    """Median ms of replays with a cold L2 cache, which take turns: under load a card becomes slower by some per cent,
    and whoever came first would gain by it."""
    replays = {name: p.replay for name, p in prepared.items() if p.replay is not None}
    times: dict[str, list[float]] = {name: [] for name in replays}
    flush = torch.empty(FLUSH if replays else 0, dtype=torch.uint8, device="cuda" if replays else "cpu")
    for _ in range(REPLAYS):
        for name, replay in replays.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {
        name: Timing(median(times[name]) if name in times else None, p.wall, p.peak, p.why)
        for name, p in prepared.items()
    }
