"""Recorded layers that keep less than all, ends in steps or open: `python tests/gpu/bench_open_ends.py`, about 3 min.

Milliseconds on the wall of a forward and backward of 8 layers, nf4 with LoRA r16, median of 7, in three ways: without
recordings; all ends in the recorded steps, with copies; all ends open. From which size on the third is faster than the
second is what `layer_frame.OPEN` is to say. MiB: of frames and recordings; the most that is allocated beside the model.
An arm whose loss or gradients are not those without recordings is marked and fails the command.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import torch
from bench_tools import START, case, failures
from slothrl_kernels import layer_frame
from test_fuse_gpu import SHAPES, adapted, distance, step
from torch import Tensor

from slothrl.activations import keep_activations
from slothrl.fuse import fuse
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of

CASES = [("8b", rows, 2048, policy) for rows in (1, 2) for policy in ("layer", "attention", "both")]
CASES += [("0.6b", rows, 1024, policy) for rows in (2, 4, 8, 16) for policy in ("layer", "attention")]
NEVER = 1 << 62  # values of a layer's input
CLOSE = 0.03  # mean relative distance of gradients in bf16 whose GEMMs have other shapes
for size in ("8b", "0.6b"):
    SHAPES[f"{size}, 8 layers"] = {**SHAPES[size], "num_hidden_layers": 8, "vocab_size": 8192}


def taken(model: Any, ids: Tensor) -> float:
    """Milliseconds of a step, which does not wait for anything but its own end."""
    times = []
    for _ in range(7):
        model.zero_grad()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * median(times)


def arm(model: Any, ids: Tensor, opened: int | None) -> tuple[dict[str, Tensor], float, str]:
    """Gradients, milliseconds and a table's cells; opened: `OPEN`, or None: without recordings."""
    layer_frame.OPEN = layer_frame.OPEN if opened is None else opened
    graph_layers(model, "off" if opened is None else "on")
    for _ in range(ARRIVALS + 2):
        step(model, ids)
    loss, gradients, peak = step(model, ids)
    graphs, held = graphs_of(model), 0
    if opened is not None:
        assert graphs is not None and not graphs.stopped and graphs.recorded
        assert all(frame.open == (opened == 1) for frame in graphs._frames.values())
        held = graphs.nbytes
    milliseconds = taken(model, ids)
    return gradients, milliseconds, f"{milliseconds:.2f} | {held / 2**20:.0f} | {peak / 2**20:.0f} | {loss:.4f}"


def row(shape: str, rows: int, length: int, policy: str) -> None:
    model = adapted(f"{shape}, 8 layers")
    ids = torch.randint(0, 8192, (rows, length), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    fuse(model)
    keep_activations(model, policy)
    eager, _, cells = arm(model, ids, None)
    found = [cells]
    for opened in (NEVER, 1):
        gradients, _, cells = arm(model, ids, opened)
        apart = distance(gradients, eager)
        found.append(f"{cells} | {apart:.4f}")
        assert apart < CLOSE, f"gradients {apart:.3f} apart"
    print(f"| {shape} | {rows} x {length} | {policy} | " + " | ".join(found) + " |", flush=True)


def main() -> int:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    arms = [f"{name} | held MiB | peak MiB | loss" for name in ("eager ms", "ends in steps ms", "open ends ms")]
    arms[1:] = [f"{columns} | apart" for columns in arms[1:]]
    print("| shape | tokens | policy | " + " | ".join(arms) + " |\n" + "|---" * 17 + "|")
    for sizes in CASES:
        with case(" ".join(map(str, sizes))):
            row(*sizes)
        torch.cuda.empty_cache()
    print(f"\n{time.time() - START:.0f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
