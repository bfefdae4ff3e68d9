"""The nf4 GEMM's part of bench_kernels.py: times beside cuBLAS and bitsandbytes, and the sweep of launches."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_tools import START, case, optional, random, random_weight
from slothrl_kernels import Nf4Weight, nf4_dequantize, nf4_matmul
from slothrl_kernels.nf4_config import Nf4Config, bucket, candidates
from slothrl_kernels.nf4_launches import choose_config
from slothrl_kernels.nf4_tuning import cold_weights, fastest, graph_microseconds

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (16, 64, 128, 256)


def compile_one(fields: list[int]) -> str:
    """Puts one launch into Triton's cache, by a tiny problem; in a process of its own."""
    try:
        config = Nf4Config(*fields)
        x = random(config.block_m, 4096)
        for splits in (1, 2):
            nf4_matmul(x, random_weight(config.block_n, 4096), config=dataclasses.replace(config, splits=splits))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{fields}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return ""


def compile_candidates() -> None:
    fields = list(dict.fromkeys(tuple(c.fields()) for rows in ROWS for c in candidates(rows)))
    with multiprocessing.get_context("spawn").Pool(min(12, multiprocessing.cpu_count())) as pool:
        errors = [e for e in pool.map_async(compile_one, map(list, fields), chunksize=1).get(timeout=90) if e]
    print(f"{len(fields)} launches compiled, {len(errors)} refused, {time.time() - START:.0f} s\n" + "\n".join(errors))


def bitsandbytes_call(x: torch.Tensor, weights: list[Nf4Weight]) -> Callable[[int], Any] | None:
    matmul_4bit, state = optional("bitsandbytes", "matmul_4bit"), optional("bitsandbytes.functional", "QuantState")
    if not (matmul_4bit and state):
        return None
    states = [
        state(w.absmax, torch.Size(w.shape), w.code, blocksize=64, quant_type="nf4", dtype=torch.bfloat16)
        for w in weights
    ]
    return lambda i: matmul_4bit(x, weights[i].packed.t(), states[i])


def bench_case(
    name: str, rows: int, weights: list[Nf4Weight], dense: list[torch.Tensor], copy: float, limit: float
) -> str:
    """Prints a row of the table; returns a line for SHIPPED where a candidate beats the launch by 2%."""
    (outputs, inputs), count = weights[0].shape, len(weights)
    x = random(rows, inputs)
    default = best = graph_microseconds(lambda i: nf4_matmul(x, weights[i]), count)
    config = choose_config(rows, outputs, inputs, x.device)
    if limit > 0:
        found, chosen = fastest(rows, weights, lambda: time.time() - START < limit)
        best, config = (found, chosen) if found < default else (best, config)
    bandwidth = (outputs * inputs // 2 + outputs * inputs // 16) / best / 1e3
    cells = [default, best, 100 * bandwidth / copy, graph_microseconds(lambda i: F.linear(x, dense[i]), len(dense))]
    cells.append(graph_microseconds(lambda i: F.linear(x, nf4_dequantize(weights[i])), count))
    theirs, peer = "-", bitsandbytes_call(x, weights)
    try:
        theirs = f"{graph_microseconds(peer, count):.1f}" if peer else "-"
    except Exception as error:  # a peer's failure is not ours
        theirs = type(error).__name__
    row = " | ".join(f"{cell:.1f}" for cell in cells)
    print(f"| {name} | {rows} | {row} | {theirs} | {config.fields()} |", flush=True)
    better = best < 0.98 * default
    return f"    ({bucket(rows)}, {outputs}, {inputs}): Nf4Config{tuple(config.fields())}," if better else ""


def bench_gemm(copy: float, limit: float) -> None:
    """limit: seconds since the start after which candidates are no longer timed; 0 for none at all."""
    print("\n### nf4 GEMM, bf16, us a call in a CUDA graph; % of copy: W's bytes at the best time\n")
    print("| case | M | default | best | % of copy | bf16 cuBLAS | dequantise + cuBLAS | bitsandbytes | best launch |")
    print("|---" * 9 + "|")
    tuned = []
    for name, (outputs, inputs) in SHAPES.items():
        size = outputs * inputs // 2
        weights = cold_weights(outputs, inputs)
        dense = [nf4_dequantize(weight) for weight in weights[: max(2, math.ceil(5e7 / size))]]
        for rows in ROWS:
            with case(f"{name} M={rows}"), torch.no_grad():
                tuned.append(bench_case(name, rows, weights, dense, copy, limit))
    lines = [line for line in tuned if line]
    print("\nSHIPPED: {\n" + "\n".join(lines) + "\n}" if lines else "\nno launch beats the chosen one by 2%")
