"""The launches of the nf4 GEMM: defaults by rows of X, how many programs share K, and candidates worth timing."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

GEMM_ROWS = 256  # rows of X from which dequantising once and torch's matmul take over
ROW_BUCKETS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Nf4Config:
    """One launch: block_m tokens by block_n weight rows, `chunks` times 64 of k a step.

    splits: programs that share K, 0 for `default_splits`. registers: at most so many a thread, 0 for no limit: two
    programs on a multiprocessor beat one that spills nothing. parts: multiplications a step, 1, 2 or 4. apart: 1 where
    the multiprocessors begin at different places of K, so that not all ask for the same lines of X at the same time.
    slots: programs a multiprocessor, each with an equal share of all tiles' steps (`nf4_shares`), in place of splits
    and apart; 0: a program a tile and split. Useful only as far as so many fit.
    """

    block_m: int
    block_n: int
    chunks: int
    warps: int = 4
    stages: int = 3
    splits: int = 0
    registers: int = 0
    parts: int = 4
    apart: int = 0
    slots: int = 0

    def fields(self) -> list[int]:
        return list(astuple(self))


# By rows of X; at most 99 KiB of shared memory, the limit of consumer cards. From sweeps on an H100, kernels/README.md.
DEFAULTS = {
    16: Nf4Config(16, 32, 4, 2, 3),
    32: Nf4Config(32, 32, 4, 2, 3),
    64: Nf4Config(64, 64, 2, 4, 3),
    # Two parts: of four Triton 3.6 makes an empty kernel for data-center Blackwell.
    128: Nf4Config(128, 128, 2, 8, 2, parts=2),
    256: Nf4Config(128, 128, 2, 8, 2, parts=2),
}


def bucket(rows: int) -> int:
    """The smallest bucket that holds `rows` tokens."""
    return next((size for size in ROW_BUCKETS if rows <= size), ROW_BUCKETS[-1])


def complete(config: Nf4Config, rows: int, outputs: int, inputs: int, processors: int) -> Nf4Config:
    """A chunk count that divides K, and a number of splits that leaves no program without work; 1 for equal shares."""
    chunks = config.chunks
    while (inputs // 64) % chunks:
        chunks //= 2
    if config.slots:
        return replace(config, chunks=chunks, splits=1, apart=0)
    steps = inputs // 64 // chunks
    splits = config.splits or default_splits(config, rows, outputs, inputs, processors)
    return replace(config, chunks=chunks, splits=max(1, min(splits, steps)))


def default_splits(config: Nf4Config, rows: int, outputs: int, inputs: int, processors: int) -> int:
    """Enough programs for each multiprocessor: four small ones, or two large tiles; partials stay the smaller part.

    A partial is 4 bytes a token and row, written and read; W is half a byte a weight: at most inputs / (8 * rows).
    """
    tiles = -(-outputs // config.block_n) * -(-rows // config.block_m)
    wanted = processors * (4 if config.block_m <= 32 else 2)
    return max(1, min(16, wanted // tiles, inputs // (8 * rows)))


# (block_n, chunks, warps, stages, registers, parts) by block_m. Two chunks are 64 bytes of a row of W, four are 128.
_TILES: dict[int, tuple[tuple[int, ...], ...]] = {
    16: (
        *((32, 4, 2, 3, 0), (32, 2, 2, 4, 0), (64, 4, 2, 3, 0), (64, 2, 2, 4, 0), (64, 2, 4, 4, 0)),
        *((64, 4, 4, 3, 0), (64, 4, 4, 4, 0), (64, 4, 4, 3, 128)),
    ),
    64: (
        *((64, 2, 4, 3, 0), (64, 2, 4, 3, 128), (64, 2, 4, 4, 128), (128, 2, 8, 3, 128), (128, 2, 8, 4, 128)),
        *((64, 2, 4, 3, 128, 1), (128, 2, 8, 3, 128, 1)),
    ),
    128: ((64, 2, 4, 3, 0), (64, 2, 4, 2, 168), (128, 2, 8, 2, 128), (128, 2, 8, 3, 128)),
}
# And with slots, as many as registers and shared memory of an H100 let fit, for equal shares.
_SHARES: dict[int, tuple[tuple[int, ...], ...]] = {
    16: ((64, 4, 4, 3, 128, 1, 4),),
    32: ((64, 4, 4, 3, 128, 2, 3),),
    64: ((64, 2, 4, 4, 128, 2, 2), (64, 2, 4, 3, 0, 2, 3), (128, 2, 8, 3, 128, 1, 2), (128, 2, 8, 3, 128, 2, 2)),
    128: ((64, 2, 4, 3, 0, 2, 2), (64, 2, 4, 2, 168, 2, 3), (128, 2, 8, 2, 128, 4, 2), (128, 2, 8, 2, 128, 2, 2)),
}


def candidates(rows: int) -> list[Nf4Config]:
    """At most 14 launches worth timing for so many rows of X, the default first; splits are left to be filled in."""
    size = bucket(rows)
    block_m = min(size, 128)
    tiles = _TILES[16 if block_m <= 32 else block_m]
    found = [Nf4Config(*[block_m, *tile[:4], 0, *tile[4:]]) for tile in tiles]
    if size == 128:
        found.append(Nf4Config(64, 128, 2, 8, 3, registers=128))
    shares = [Nf4Config(*[block_m, *tile[:4], 0, *tile[4:6]], slots=tile[6]) for tile in _SHARES[block_m]]
    return list(dict.fromkeys([DEFAULTS[size], *found, *shares]))
