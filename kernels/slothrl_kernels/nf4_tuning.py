"""Finding the fastest launch of the nf4 GEMM on this GPU by timing.

Candidates run on random weights, in CUDA graphs and with W out of cache as in decoding; each is checked against the
reference before it may win. Winners are kept for later processes (`nf4_launches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from slothrl_kernels.nf4_config import ROW_BUCKETS, Nf4Config, candidates, complete
from slothrl_kernels.nf4_decode import NF4_CODE
from slothrl_kernels.nf4_launches import choose_config, found_launches, keep
from slothrl_kernels.nf4_lora import LoraDelta, nf4_lora_matmul_reference
from slothrl_kernels.nf4_matmul import launch
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import processors

RANK = 16  # of the LoRA that candidates run with, as in generation: it costs registers, which decide
COLD = 200_000_000  # bytes of W to walk over, several times any L2 cache


def tune(
    shapes: Iterable[tuple[int, int]], rows: Iterable[int] = ROW_BUCKETS, device: str | torch.device = "cuda"
) -> dict[tuple[int, int, int], Nf4Config]:
    """Find and keep the fastest launch of each shape (N, K) for each number of rows; about 3 s each, once compiled.

    Returns:
        The winners by (rows bucket, N, K), those included that were known before.
    """
    device = torch.device(device)
    best = dict(found_launches(device))
    for outputs, inputs in shapes:
        weights = cold_weights(outputs, inputs, device)
        for count in rows:
            best[count, outputs, inputs] = fastest(count, weights)[1]
    keep(best, device)
    return best


def fastest(rows: int, weights: list[Nf4Weight], wanted: Callable[[], bool] = lambda: True) -> tuple[float, Nf4Config]:
    """(us a call, launch) of the fastest right candidate, and around it of other numbers of splits.

    Args:
        weights: copies of one shape, enough to be out of cache when the first comes round again.
        wanted: asked before each candidate; False ends the search early.
    """
    outputs, inputs = weights[0].shape
    device = weights[0].packed.device
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    lora = LoraDelta.zeros(RANK, inputs, (outputs,), x)
    lora.a.normal_(std=inputs**-0.5)
    lora.b.normal_(std=0.1)
    exact = nf4_lora_matmul_reference(x, weights[0], lora).float()
    found: list[tuple[float, Nf4Config]] = []

    def attempt(config: Nf4Config) -> None:
        config = complete(config, rows, outputs, inputs, processors(device))
        try:
            result = launch(x, weights[0], None, config, lora).float()
        except Exception:  # a launch that this GPU or Triton refuses is no candidate
            return
        if (result - exact).norm() <= 1e-2 * exact.norm():
            call = lambda i: launch(x, weights[i], None, config, lora)  # noqa: E731
            found.append((graph_microseconds(call, len(weights), 3), config))

    for config in candidates(rows):
        if wanted():
            attempt(config)
    if found:
        base = min(found, key=lambda pair: pair[0])[1]
        for splits in {1, base.splits // 2, base.splits * 2, base.splits * 3} - {0, base.splits}:
            attempt(replace(base, splits=splits))
    default = choose_config(rows, outputs, inputs, device)
    return min(found, key=lambda pair: pair[0], default=(float("inf"), default))


def cold_weights(outputs: int, inputs: int, device: str | torch.device = "cuda") -> list[Nf4Weight]:
    """Random weights of one shape, together larger than a cache; random bytes time as a quantised matrix does."""
    count = max(2, -(-COLD // (outputs * inputs // 2)))
    code = torch.tensor(NF4_CODE, device=device)

    def one() -> Nf4Weight:
        packed = torch.randint(256, (outputs * inputs // 2, 1), dtype=torch.uint8, device=device)
        absmax = torch.rand(outputs * inputs // 64, device=device) * 0.05 + 0.01
        return Nf4Weight(packed, absmax, code, (outputs, inputs))

    return [one() for _ in range(count)]


def graph_microseconds(call: Callable[[int], Any], copies: int, replays: int = 7) -> float:
    """us a call: a CUDA graph of one call on each copy, median of some replays."""
    stream, graph, times = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(stream), torch.no_grad():
        call(0)  # on the stream that captures: see nf4_matmul on CUDA graphs
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(copies):
                call(i)
        graph.replay()
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / copies)
    return sorted(times)[replays // 2]
