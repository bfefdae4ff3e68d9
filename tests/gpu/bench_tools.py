"""What the kernel benchmarks share: failing cases that are counted, cold timings, table rows."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from slothrl_kernels import Nf4Weight
from slothrl_kernels.nf4_decode import NF4_CODE
from triton.testing import do_bench

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


def milliseconds(call: Callable[[], Any]) -> float:
    return float(do_bench(call, warmup=5, rep=25, return_mode="median"))


def optional(module: str, name: str) -> Any:
    """A peer's function, or None where the peer is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def copy_bandwidth() -> float:
    """GB/s of torch's copy of 1 GiB, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def header(title: str, peers: list[str]) -> None:
    print(f"\n### {title}\n\n| case | ms | GB/s | % of copy | " + " | ".join(f"{p} ms" for p in peers) + " |")
    print("|---" * (4 + len(peers)) + "|", flush=True)


def line(name: str, size: int, copy: float, ours: Callable, peers: list[Callable | None]) -> None:
    """One row: our time and bandwidth over `size` bytes, and the peers' times."""
    with case(name):
        taken = milliseconds(ours)
        cells = [f"{taken:.4f}", f"{size / taken / 1e6:.0f}", f"{100 * size / taken / 1e6 / copy:.0f}"]
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
