"""The nf4 GEMM's launches timed for all linear layers of a decoding step, LoRA r16 and the inputs' kernel included.

    python tests/gpu/sweep_nf4_decode.py            # an H100: within 90 s of starting, most of them compiling
    python tests/gpu/sweep_nf4_decode.py --rows 64,128 --limit 60
    TRITON_INTERPRET=1 python tests/gpu/sweep_nf4_decode.py --tiny     # a rehearsal on a CPU, some 10 s

Each launch is compared with the reference before it is timed; wrong ones cannot win and are counted. W is out of cache,
and calls run in CUDA graphs. Tiles are tried on the 8B shape, with 1 and 4 multiplications a step; around the best of
them, other splits, parts and places in K, and more or less of W asked for ahead; the other models take the 8B shapes'
best of each number of rows. One slice a LoRA, as when launches are tuned. Ends with lines for `nf4_launches.SHIPPED`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from slothrl_kernels.nf4_config import Nf4Config, bucket, candidates
from slothrl_kernels.nf4_launches import choose_config
from slothrl_kernels.nf4_matmul import AHEAD
from slothrl_kernels.nf4_tuning import Trial, cold_weights, graph_microseconds

START = time.time()
# (N, K) of a layer's four launches, and the number of layers.
MODELS: dict[str, tuple[list[tuple[int, int]], int]] = {
    "8b": ([(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], 32),
    "3b": ([(2560, 2048), (2048, 2048), (22016, 2048), (2048, 11008)], 36),
    "0.5b": ([(1152, 896), (896, 896), (9728, 896), (896, 4864)], 24),
}
TINY: dict[str, tuple[list[tuple[int, int]], int]] = {"8b": ([(64, 128), (24, 256)], 2), "0.5b": ([(40, 192)], 2)}
AHEADS = (0, AHEAD // 4, AHEAD * 2)


def host_microseconds(call: Callable[[int], Any], _: int) -> float:
    """us of one call by the host's clock: for the rehearsal."""
    start = time.perf_counter()
    call(0)
    return (time.perf_counter() - start) * 1e6


def first_tiles(rows: int, tiny: bool) -> list[Nf4Config]:
    """What is tried on the 8B shape."""
    tiles = [Nf4Config(16, 16, 2, 4, 2)] if tiny else candidates(rows)
    return list(dict.fromkeys(replace(config, parts=parts) for config in tiles for parts in (4, 1)))


def compile_one(fields: list[int]) -> str:
    """Puts one launch into Triton's cache, by a small problem; in a process of its own."""
    config = Nf4Config(*fields)
    try:
        Trial.of(config.block_m, cold_weights(512, 4096, copies=1)).call(config, 0)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{fields}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return ""


def compile_all(tiles: list[Nf4Config], limit: float) -> None:
    """Both with K shared and not, which are two kernels; what is not ready in time is compiled when it is timed."""
    jobs = [replace(config, splits=splits).fields() for config in tiles for splits in (2, 1)]
    with multiprocessing.get_context("spawn").Pool(min(14, multiprocessing.cpu_count())) as pool:
        waiting = pool.map_async(compile_one, jobs, chunksize=1)
        waiting.wait(limit)
        errors = [error for error in waiting.get() if error] if waiting.ready() else ["not all in time"]
    print(f"{len(jobs)} launches compiled, {len(errors)} refused, {time.time() - START:.0f} s", flush=True)
    print("\n".join(errors[:8]), flush=True)


class Sweep:
    """Times by (model, rows): what is chosen now, the best, the best without starting early."""

    def __init__(self, arguments: argparse.Namespace):
        self.tiny, self.limit = arguments.tiny, arguments.limit
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self.timer = host_microseconds if self.tiny else partial(graph_microseconds, replays=3)
        self.totals: dict[tuple[str, int], list[float]] = {}
        self.good: dict[int, list[Nf4Config]] = {}  # the 8B shapes' best, by rows
        self.shipped: list[str] = []
        self.wrong = 0

    def times(self, trial: Trial, configs: list[Nf4Config], ahead: int = AHEAD) -> list[tuple[float, Nf4Config]]:
        """(us, launch) of those that are right, the fastest first."""
        found = []
        for config in dict.fromkeys(trial.complete(config) for config in configs):
            if time.time() - START < self.limit:
                found.append((trial.microseconds(config, ahead, self.timer), config))
                self.wrong += math.isinf(found[-1][0])
        return sorted([pair for pair in found if math.isfinite(pair[0])], key=lambda pair: pair[0])

    def shape(self, model: str, outputs: int, inputs: int, rows: list[int], layers: int) -> None:
        """All numbers of rows on one shape."""
        weights = cold_weights(outputs, inputs, self.device, copies=2 if self.tiny else 0)
        own: dict[int, list[Nf4Config]] = {}  # one row takes what 16 rows found on this shape
        for count in rows:
            size = bucket(count)
            known = own.get(size) or self.good.get(size, [])
            tiles = known if known and (model != "8b" or size in own) else first_tiles(count, self.tiny)
            trial = Trial.of(count, weights)
            found = self.search(trial, tiles)
            own.setdefault(size, [replace(config, splits=0, apart=0) for _, config in found[:3]])
            self.add(model, trial, found, layers)
        if model == "8b":
            for size, tiles in own.items():
                self.good[size] = list(dict.fromkeys(self.good.get(size, []) + tiles[:2]))

    def search(self, trial: Trial, tiles: list[Nf4Config]) -> list[tuple[float, Nf4Config]]:
        """The launch that is chosen now, some tiles, and what is around the best of them."""
        rows, (outputs, inputs) = len(trial.x), trial.weights[0].shape
        found = self.times(trial, [choose_config(rows, outputs, inputs, self.device), *tiles])
        if not found:
            return found
        base = found[0][1]
        around = [replace(base, splits=n) for n in (1, base.splits // 2, base.splits * 2, base.splits * 3) if n]
        around += [replace(base, parts=2), *(replace(config, apart=1) for _, config in found[:2])]
        new = [config for config in around if config not in {known for _, known in found}]
        return sorted(found + self.times(trial, new), key=lambda pair: pair[0])

    def add(self, model: str, trial: Trial, found: list[tuple[float, Nf4Config]], layers: int) -> None:
        """Prints one shape's result, and adds it to the model's step."""
        rows, (outputs, inputs) = len(trial.x), trial.weights[0].shape
        now = choose_config(rows, outputs, inputs, self.device)
        current = next((value for value, config in found if config == now), math.nan)
        best, config = found[0] if found else (math.nan, now)
        ahead = {size: self.times(trial, [config], size) for size in AHEADS}
        late = ahead[0][0][0] if ahead[0] else math.nan
        total = self.totals.setdefault((model, rows), [0.0, 0.0, 0.0])
        for i, value in enumerate((current, best, late)):
            total[i] += value * layers / 1e3
        asked = ", ".join(f"{size >> 20} MiB {pairs[0][0]:.1f}" for size, pairs in ahead.items() if pairs)
        top = ", ".join(f"{value:.1f} {c.fields()}" for value, c in found[:4])
        print(f"{model} {outputs} x {inputs} M={rows}: now {current:.1f}; {top}; ahead {asked}", flush=True)
        if best < 0.98 * current and rows > 1:
            self.shipped.append(f"        ({bucket(rows)}, {outputs}, {inputs}): Nf4Config{tuple(config.fields())},")

    def report(self) -> None:
        print("\n| model | rows | chosen now, ms a step | best | best, not started early |\n|---|---|---|---|---|")
        for (model, rows), (current, best, late) in self.totals.items():
            print(f"| {model} | {rows} | {current:.2f} | {best:.2f} | {late:.2f} |")
        print("\nSHIPPED:\n" + "\n".join(self.shipped))
        print(f"\n{self.wrong} launches refused or wrong; {time.time() - START:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="16,64,128,256,1")
    parser.add_argument("--models", default="8b,3b,0.5b")
    parser.add_argument("--limit", type=float, default=85, help="seconds after which nothing more is tried")
    parser.add_argument("--tiny", action="store_true", help="small shapes, in Triton's interpreter")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [3, 17, 1] if arguments.tiny else [int(n) for n in arguments.rows.split(",")]
    if not arguments.tiny:
        tiles = list(dict.fromkeys(config for n in rows for config in first_tiles(n, False)))
        compile_all(tiles, arguments.limit * 0.55)
    sweep = Sweep(arguments)
    for model, (shapes, layers) in (TINY if arguments.tiny else MODELS).items():
        for outputs, inputs in shapes if model in arguments.models.split(",") else ():
            with torch.no_grad():
                sweep.shape(model, outputs, inputs, rows, layers)
    sweep.report()


if __name__ == "__main__":
    main()
