"""The launches of the nf4 GEMM: defaults by rows of X, how many programs share K, and candidates worth timing."""

from __future__ import annotations

from dataclasses import dataclass, replace

GEMM_ROWS = 256  # rows of X from which dequantising once and torch's matmul take over
ROW_BUCKETS = (1, 2, 4, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Nf4Config:
    """One launch. block_m tokens (1: the matrix-vector kernel) by block_n weight rows, `chunks` times 64 of k a step.

    scale_first: 1 puts absmax onto the decoded weights in 16 bits, 0 onto each chunk's float32 sums, which is more
    exact and dearer from some 64 tokens on. splits: programs that share K, 0 for `default_splits`.
    """

    block_m: int
    block_n: int
    chunks: int
    scale_first: int = 0
    warps: int = 4
    stages: int = 3
    splits: int = 0

    def fields(self) -> list[int]:
        return [self.block_m, self.block_n, self.chunks, self.scale_first, self.warps, self.stages, self.splits]


# By rows of X; at most 99 KiB of shared memory, the limit of consumer cards. From sweeps on an H100, kernels/README.md.
DEFAULTS = {
    1: Nf4Config(1, 128, 2, 0, 2, 2),
    2: Nf4Config(16, 64, 2, 0, 4, 3),
    4: Nf4Config(16, 64, 2, 0, 4, 3),
    16: Nf4Config(16, 32, 2, 0, 2, 4),
    32: Nf4Config(32, 64, 2, 0, 4, 3),
    64: Nf4Config(64, 128, 1, 0, 8, 3),
    128: Nf4Config(128, 128, 1, 1, 4, 3),
    256: Nf4Config(128, 128, 1, 1, 4, 3),
}


def bucket(rows: int) -> int:
    """The smallest bucket that holds `rows` tokens."""
    return next((size for size in ROW_BUCKETS if rows <= size), ROW_BUCKETS[-1])


def complete(config: Nf4Config, rows: int, outputs: int, inputs: int, processors: int) -> Nf4Config:
    """A chunk count that divides K, and a number of splits that leaves no program without work."""
    chunks = config.chunks
    while (inputs // 64) % chunks:
        chunks //= 2
    steps = inputs // 64 // chunks
    splits = config.splits or default_splits(config, rows, outputs, inputs, processors)
    return replace(config, chunks=chunks, splits=max(1, min(splits, steps)))


def default_splits(config: Nf4Config, rows: int, outputs: int, inputs: int, processors: int) -> int:
    """Enough programs for each multiprocessor: ten small ones, four, or two of the large tiles; partials stay the
    smaller part.

    A partial is 4 bytes a token and row, written and read; W is half a byte a weight: at most inputs / (8 * rows).
    """
    tiles = -(-outputs // config.block_n) * -(-rows // config.block_m)
    wanted = processors * (10 if config.block_m == 1 else 4 if config.block_m <= 32 else 2)
    return max(1, min(16, wanted // tiles, inputs // (8 * rows)))


def candidates(rows: int) -> list[Nf4Config]:
    """At most 12 launches worth timing for so many rows of X, the default first; splits are left to be filled in."""
    size = bucket(rows)
    if size == 1:
        found = [Nf4Config(16, n, 2, 0, 4, stages) for n, stages in ((32, 4), (64, 3), (64, 6), (128, 3), (128, 4))]
        tiles = ((16, 4, 4), (64, 2, 4), (64, 1, 2), (128, 1, 2), (128, 2, 2), (256, 1, 4))
        found += [Nf4Config(1, n, chunks, 0, warps, 2) for n, chunks, warps in tiles]
    elif size <= 32:
        tiles = ((64, 1, 4, 5), (64, 2, 4, 3), (64, 2, 4, 4), (64, 2, 4, 5), (64, 4, 4, 3), (128, 1, 4, 4))
        tiles += ((128, 2, 4, 3), (128, 2, 8, 4), (128, 4, 8, 3), (32, 2, 2, 4))
        found = [Nf4Config(max(16, size), n, chunks, 0, warps, stages) for n, chunks, warps, stages in tiles]
    elif size == 64:
        tiles = ((64, 1, 0, 4, 4), (64, 2, 0, 4, 3), (64, 2, 1, 4, 3), (64, 4, 1, 4, 2), (128, 1, 0, 8, 3))
        tiles += ((128, 2, 0, 8, 2), (128, 2, 1, 8, 3), (128, 2, 1, 4, 3), (128, 4, 1, 8, 2), (128, 1, 1, 8, 4))
        found = [Nf4Config(64, *tile) for tile in tiles]
    else:
        tiles = ((64, 1, 1, 4, 4), (64, 2, 1, 4, 2), (128, 1, 1, 4, 3), (128, 1, 1, 8, 3), (128, 2, 1, 8, 2))
        tiles += ((256, 1, 1, 8, 3),)
        found = [Nf4Config(128, *tile) for tile in tiles]
        found += [Nf4Config(64, 128, 2, 1, 8, 3), Nf4Config(64, 256, 1, 1, 8, 3), Nf4Config(64, 128, 2, 0, 8, 2)]
        found += [Nf4Config(256, 64, 1, 1, 4, 2), Nf4Config(256, 128, 1, 1, 8, 2)] if size == 256 else []
    return list(dict.fromkeys([DEFAULTS[size], *found]))[:12]
