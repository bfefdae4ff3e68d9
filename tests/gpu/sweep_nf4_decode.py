"""The nf4 GEMM's launches timed for all linear layers of a decoding step, LoRA r16 and the inputs' kernel included.

    python tests/gpu/sweep_nf4_decode.py            # an H100: within 90 s of starting, most of them compiling
    python tests/gpu/sweep_nf4_decode.py --rows 64,128 --limit 60
    python tests/gpu/sweep_nf4_decode.py --keep     # and later processes of this user take the winners
    TRITON_INTERPRET=1 python tests/gpu/sweep_nf4_decode.py --tiny     # a rehearsal on a CPU, some 10 s

Each launch is compared with the reference before it is timed; wrong ones cannot win and are counted. W is out of cache,
and calls run in CUDA graphs. Tiles are tried on the 8B shape, with 1 and 4 multiplications a step, some with 2, in a
grid and in equal shares; around the best of them, other splits and places in K, one to four shares a multiprocessor,
and more or less of W asked for ahead; the other models take the 8B shapes' best of each number of rows. One slice a
LoRA, as when launches are tuned. Beside 128 and 256 rows stands what dequantising and cuBLAS take, without a LoRA. Ends
with lines for `nf4_launches.SHIPPED`.
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
import torch.nn.functional as F
from slothrl_kernels.nf4_config import DEFAULTS, Nf4Config, bucket, candidates
from slothrl_kernels.nf4_dequantize import nf4_dequantize
from slothrl_kernels.nf4_launches import Winners, cache_file, choose_config, found_launches, keep
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
AHEADS = (AHEAD // 4, AHEAD * 2)


def host_microseconds(call: Callable[[int], Any], _: int) -> float:
    """us of one call by the host's clock: for the rehearsal."""
    start = time.perf_counter()
    call(0)
    return (time.perf_counter() - start) * 1e6


def first_tiles(rows: int, tiny: bool) -> list[Nf4Config]:
    """What is tried on the 8B shape."""
    tiles = [Nf4Config(16, 16, 2, 4, 2), Nf4Config(16, 16, 1, 4, 2, slots=1)] if tiny else candidates(rows)
    found = []
    for config in tiles:
        large = config.block_m >= 64 and config.registers == 128
        found += [replace(config, parts=parts) for parts in ((4, 2, 1) if large else (4, 1))]
        found += [config] if config.slots else []
    return list(dict.fromkeys(found))


def first_shares(configs: list[Nf4Config]) -> list[Nf4Config]:
    """The first with equal shares, if any: of sorted ones the fastest."""
    return [config for config in configs if config.slots][:1]


def compile_one(job: tuple[list[int], int, int]) -> str:
    """Puts one launch into Triton's cache, by a small problem of K inputs; in a process of its own."""
    fields, inputs, ahead = job
    config = Nf4Config(*fields)
    try:
        Trial.of(config.block_m, cold_weights(512, inputs, copies=1)).call(config, 0, ahead)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{fields}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return ""


def compile_all(pool: Any, tiles: list[Nf4Config], inputs: int, limit: float, ahead: int = AHEAD) -> None:
    """Both with K shared and not, which are two kernels; what is not ready in time is compiled when it is timed.

    Equal shares are one kernel, of however many programs.
    """
    tiles = [config for config in tiles if (inputs // 64) % config.chunks == 0]
    tiles = list(dict.fromkeys(replace(config, slots=min(1, config.slots)) for config in tiles))
    kernels = [replace(c, splits=splits) for c in tiles for splits in ((1,) if c.slots else (2, 1))]
    jobs = [(config.fields(), inputs, ahead) for config in dict.fromkeys(kernels)]
    waiting = pool.map_async(compile_one, jobs, chunksize=1)
    waiting.wait(max(0.0, limit))
    errors = [error for error in waiting.get() if error] if waiting.ready() else ["not all in time"]
    print(f"{len(jobs)} launches compiled, {len(errors)} refused, {time.time() - START:.0f} s", flush=True)
    print("\n".join(errors[:8]), flush=True)


class Sweep:
    """Times by (model, rows): what is chosen now, the best, the best without starting early and without shares."""

    def __init__(self, arguments: argparse.Namespace):
        self.tiny, self.limit = arguments.tiny, arguments.limit
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self.timer = host_microseconds if self.tiny else partial(graph_microseconds, replays=3)
        self.totals: dict[tuple[str, int], list[float]] = {}
        self.good: dict[int, list[Nf4Config]] = {}  # the 8B shapes' best, by rows
        self.best: list[tuple[int, int, int, Nf4Config, int]] = []  # the 8B shapes': rows, N, K, launch, layers
        self.winners: Winners = {}  # where they are faster by 2 %
        self.wrong = 0

    def left(self) -> float:
        """Seconds until nothing more is tried."""
        return self.limit - (time.time() - START)

    def times(self, trial: Trial, configs: list[Nf4Config], ahead: int = AHEAD) -> list[tuple[float, Nf4Config]]:
        """(us, launch) of those that are right, the fastest first."""
        found = []
        for config in dict.fromkeys(trial.complete(config) for config in configs):
            if self.left() > 0:
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
            sorted_ones = [replace(config, splits=0, apart=0) for _, config in found]
            own.setdefault(size, list(dict.fromkeys(sorted_ones[:3] + first_shares(sorted_ones))))
            self.add(model, trial, found, layers)
        if model == "8b":
            for size, tiles in own.items():
                good = self.good.get(size, []) + tiles[:1] + first_shares(tiles)
                self.good[size] = list(dict.fromkeys(good))

    def search(self, trial: Trial, tiles: list[Nf4Config]) -> list[tuple[float, Nf4Config]]:
        """The launch that is chosen now, some tiles, and what is around the best of them."""
        rows, (outputs, inputs) = len(trial.x), trial.weights[0].shape
        found = self.times(trial, [choose_config(rows, outputs, inputs, self.device), *tiles])
        if not found:
            return found
        known = [config for _, config in found]
        grids = [config for config in known if not config.slots]
        around = [replace(c, splits=n) for c in grids[:1] for n in (1, c.splits // 2, c.splits * 2, c.splits * 3) if n]
        around += [replace(config, apart=1) for config in grids[:2]]
        around += [replace(config, slots=n) for config in first_shares(known) for n in (1, 2, 3, 4)]
        new = [config for config in around if trial.complete(config) not in known]
        return sorted(found + self.times(trial, new), key=lambda pair: pair[0])

    def add(self, model: str, trial: Trial, found: list[tuple[float, Nf4Config]], layers: int) -> None:
        """Prints one shape's result, and adds it to the model's step."""
        rows, (outputs, inputs) = len(trial.x), trial.weights[0].shape
        now = choose_config(rows, outputs, inputs, self.device)
        current = next((value for value, config in found if config == now), math.nan)
        best, config = found[0] if found else (math.nan, now)
        ahead = {size: self.times(trial, [config], size) for size in AHEADS}
        grid = next((value for value, c in found if not c.slots), math.nan)
        total = self.totals.setdefault((model, rows), [0.0, 0.0, 0.0, 0.0])
        for i, value in ((0, current), (1, best), (3, grid)):
            total[i] += value * layers / 1e3
        if model == "8b":
            self.best.append((rows, outputs, inputs, config, layers))
        asked = ", ".join(f"{size >> 20} MiB {pairs[0][0]:.1f}" for size, pairs in ahead.items() if pairs)
        top = ", ".join(f"{value:.1f} {c.fields()}" for value, c in found[:4])
        beside = f"; grid {grid:.1f}; ahead {asked}{self.dense(model, trial)}"
        print(f"{model} {outputs} x {inputs} M={rows}: now {current:.1f}; {top}{beside}", flush=True)
        if best < 0.98 * current and rows > 1:
            self.winners[bucket(rows), outputs, inputs] = config

    def dense(self, model: str, trial: Trial) -> str:
        """What dequantising and cuBLAS take, for many rows of the 8B shape."""
        if model != "8b" or len(trial.x) < 128 or self.left() <= 0:
            return ""
        weights = trial.weights
        found = self.timer(lambda i: F.linear(trial.x, nf4_dequantize(weights[i], trial.x.dtype)), len(weights))
        return f"; dequantise + cuBLAS {found:.1f}"

    def late(self) -> None:
        """The 8B shapes' best again, without starting early, which is another kernel."""
        for rows, outputs, inputs, config, layers in self.best:
            weights = cold_weights(outputs, inputs, self.device, copies=2 if self.tiny else 0)
            found = self.times(Trial.of(rows, weights), [config], 0)
            self.totals["8b", rows][2] += found[0][0] * layers / 1e3 if found else math.nan

    def report(self) -> None:
        print("\n| model | rows | chosen now, ms a step | best | best without shares | best, not started early |")
        print("|---" * 6 + "|")
        for (model, rows), (current, best, late, grid) in self.totals.items():
            last = f"{late:.2f}" if late else "-"
            print(f"| {model} | {rows} | {current:.2f} | {best:.2f} | {grid:.2f} | {last} |")
        print("\nSHIPPED:")
        for key, config in self.winners.items():
            print(f"    {key}: Nf4Config{tuple(config.fields())},")
        print(f"\n{self.wrong} launches refused or wrong; {time.time() - START:.0f} s")


def keep_winners(winners: Winners) -> None:
    """Into this user's cache, beside what is there."""
    device = torch.device("cuda", torch.cuda.current_device())
    keep({**found_launches(device), **winners}, device)
    print(f"{len(winners)} kept in {cache_file()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="16,64,128,256,1")
    parser.add_argument("--models", default="8b,3b,0.5b")
    parser.add_argument("--limit", type=float, default=85, help="seconds after which nothing more is tried")
    parser.add_argument("--keep", action="store_true", help="later processes of this user take the winners")
    parser.add_argument("--tiny", action="store_true", help="small shapes, in Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.keep and arguments.tiny:
        parser.error("a rehearsal's launches are not worth keeping")
    torch.manual_seed(0)
    models = TINY if arguments.tiny else {name: MODELS[name] for name in arguments.models.split(",")}
    rows = [3, 17, 1] if arguments.tiny else [int(n) for n in arguments.rows.split(",")]
    sweep = Sweep(arguments)
    workers = 1 if arguments.tiny else min(14, multiprocessing.cpu_count())
    with multiprocessing.get_context("spawn").Pool(workers) as pool, torch.no_grad():
        if not arguments.tiny:
            compile_all(pool, [c for n in rows for c in first_tiles(n, False)], 4096, arguments.limit * 0.5)
        for name, (shapes, layers) in models.items():
            if name == "3b" and sweep.good:  # K / 64 is no multiple of 16 here: other kernels
                good = [config for tiles in sweep.good.values() for config in tiles]
                good += [DEFAULTS[bucket(n)] for n in rows]
                compile_all(pool, good + [replace(config, chunks=2) for config in good], 11008, min(12, sweep.left()))
            for outputs, inputs in shapes:
                sweep.shape(name, outputs, inputs, rows, layers)
            if name == "8b":
                if not arguments.tiny:
                    compile_all(pool, [config for *_, config, _ in sweep.best], 4096, min(12, sweep.left()), ahead=0)
                sweep.late()
    sweep.report()
    if arguments.keep:
        keep_winners(sweep.winners)


if __name__ == "__main__":
    main()
