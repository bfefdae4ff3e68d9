"""Finding the fastest launch of the nf4 GEMM on this GPU by timing.

Candidates run on random weights, in CUDA graphs and with W out of cache as in decoding; each is checked against the
reference before it may win. Winners are kept for later processes (`nf4_launches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slothrl_kernels.nf4_config import ROW_BUCKETS, Nf4Config, candidates, complete
from slothrl_kernels.nf4_decode import NF4_CODE
from slothrl_kernels.nf4_launches import choose_config, found_launches, keep
from slothrl_kernels.nf4_lora import LoraDelta, nf4_lora_matmul_reference
from slothrl_kernels.nf4_matmul import AHEAD, launch
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import processors

RANK = 16  # of the LoRA that candidates run with, as in generation: it costs registers, which decide
Timer = Callable[[Callable[[int], Any], int], float]
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
            keep(best, device)  # each as it is found: a call may be interrupted
    return best


@dataclass(frozen=True)
class Trial:
    """One problem that launches are timed on: copies of a weight (N, K), X (rows, K), a LoRA, and the exact Y."""

    weights: list[Nf4Weight]
    x: Tensor
    lora: LoraDelta
    exact: Tensor

    @classmethod
    def of(cls, rows: int, weights: list[Nf4Weight]) -> Trial:
        outputs, inputs = weights[0].shape
        x = torch.randn(rows, inputs, device=weights[0].packed.device).to(torch.bfloat16)
        lora = LoraDelta.zeros(RANK, inputs, (outputs,), x)
        lora.a.normal_(std=inputs**-0.5)
        lora.b.normal_(std=0.1)
        return cls(weights, x, lora, nf4_lora_matmul_reference(x, weights[0], lora).float())

    def complete(self, config: Nf4Config) -> Nf4Config:
        outputs, inputs = self.weights[0].shape
        return complete(config, len(self.x), outputs, inputs, processors(self.x.device))

    def call(self, config: Nf4Config, copy: int, ahead: int = AHEAD) -> Tensor:
        """Y of one of the weights."""
        return launch(self.x, self.weights[copy], None, config, self.lora, ahead)

    def microseconds(self, config: Nf4Config, ahead: int = AHEAD, timer: Timer | None = None) -> float:
        """us a call, W out of cache; infinity for a launch that is refused here or gives wrong results.

        ahead: as in `nf4_matmul.launch`. timer: takes the call and the number of weights; by default in a CUDA graph.
        """
        try:
            result = self.call(config, 0, ahead).float()
        except Exception:  # a launch that this GPU or Triton refuses is no candidate
            return float("inf")
        if not (result - self.exact).norm() <= 1e-2 * self.exact.norm():
            return float("inf")
        return (timer or graph_microseconds)(lambda i: self.call(config, i, ahead), len(self.weights))


def fastest(rows: int, weights: list[Nf4Weight], wanted: Callable[[], bool] = lambda: True) -> tuple[float, Nf4Config]:
    """(us a call, launch) of the fastest right candidate, and around it of other splits, parts, shares and places in K.

    Args:
        weights: copies of one shape, enough to be out of cache when the first comes round again.
        wanted: asked before each candidate; False ends the search early.
    """
    trial = Trial.of(rows, weights)
    outputs, inputs = weights[0].shape
    best = float("inf"), choose_config(rows, outputs, inputs, trial.x.device)
    for config in candidates(rows):
        if wanted():
            config = trial.complete(config)
            best = min(best, (trial.microseconds(config), config), key=lambda pair: pair[0])
    splits, parts, slots = best[1].splits, best[1].parts, best[1].slots
    changes = [{"parts": n} for n in {1, 2, 4} - {parts}] + [{"slots": n} for n in {1, 2, 3, 4} - {slots}]
    if not slots:
        changes += [{"splits": n} for n in {1, splits // 2, splits * 2, splits * 3} - {0, splits}] + [{"apart": 1}]
    for change in changes:
        if wanted():
            config = trial.complete(replace(best[1], **change))
            best = min(best, (trial.microseconds(config), config), key=lambda pair: pair[0])
    return best


def cold_weights(outputs: int, inputs: int, device: str | torch.device = "cuda", copies: int = 0) -> list[Nf4Weight]:
    """Random weights of one shape, by default so many that together they are larger than a cache.

    Random bytes time as a quantised matrix does.
    """
    count = copies or max(2, -(-COLD // (outputs * inputs // 2)))
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
