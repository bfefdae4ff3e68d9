"""What the kernel benchmarks share: failing cases that are counted, cold timings of the device alone, table rows."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from slothrl_kernels import Nf4Weight
from slothrl_kernels.nf4_decode import NF4_CODE

START = time.time()
failures: list[str] = []


@contextmanager
def case(name: str):
    """A failing case is printed and counted, and the next one runs."""
    try:
        yield
    except Exception as error:
        failures.append(name)
        print(f"| {name} FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}", flush=True)


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Device time of a call, the median, with a cold L2 cache; the host's time is not in it.

    The device sleeps while the host submits all calls, so that they run without waiting for Python: an autograd
    function takes the host 50 to 100 us, which would hide every kernel shorter than that. Where the host is slower than
    the sleep, that is made longer; a call that waits for the device itself is timed with the host's part.
    """
    flush = torch.empty(128 << 20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    cycles = 20_000_000
    times: list[float] = []
    for _ in range(4):
        torch.cuda.synchronize()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        slept = torch.cuda.Event()
        torch.cuda._sleep(cycles)
        slept.record()
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        enough = not slept.query()
        torch.cuda.synchronize()
        times = sorted(start.elapsed_time(end) for start, end in events)
        if enough:
            break
        cycles *= 4
    return times[repeats // 2]


def optional(module: str, name: str) -> Any:
    """A peer's function, or None where the peer is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def copy_bandwidth() -> float:
    """GB/s of torch's copy of 1 GiB, reads and writes counted."""
    return copy_of(2 << 30)[1]


@cache
def copy_of(size: int) -> tuple[float, float]:
    """Milliseconds and GB/s of a copy that reads and writes `size` bytes together."""
    source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    taken = milliseconds(lambda: target.copy_(source))
    return taken, size / taken / 1e6


def header(title: str, peers: list[str]) -> None:
    columns = ["case", "ms", "GB/s", "% of copy", "% of a copy as large", *(f"{peer} ms" for peer in peers)]
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def line(name: str, size: int, copy: float, ours: Callable, peers: list[Callable | None]) -> None:
    """One row: our time and bandwidth over `size` bytes, also against a copy of so few bytes, and the peers' times."""
    with case(name):
        taken = milliseconds(ours)
        cells = [f"{taken:.4f}", f"{size / taken / 1e6:.0f}", f"{100 * size / taken / 1e6 / copy:.0f}"]
        cells.append(f"{100 * copy_of(size)[0] / taken:.0f}")
        for peer in peers:
            try:
                cells.append("-" if peer is None else f"{milliseconds(peer):.4f}")
            except Exception as error:  # a peer's failure is not ours
                cells.append(type(error).__name__)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def random(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def backward_of(forward: Callable[[], Any] | None, inputs: list[torch.Tensor], gradients: Any) -> Callable | None:
    """A call of the backward alone; the graph is built once, here."""
    if forward is None:
        return None
    try:
        outputs = forward()
    except Exception:
        return forward  # fails again, in its cell
    return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def random_weight(outputs: int, inputs: int) -> Nf4Weight:
    """Random bytes are as good as a quantised matrix, and need no bitsandbytes."""
    packed = torch.randint(256, (outputs * inputs // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(outputs * inputs // 64, device="cuda") * 0.05 + 0.01
    return Nf4Weight(packed, absmax, torch.tensor(NF4_CODE, device="cuda"), (outputs, inputs))
