"""What the nf4 GEMM reads besides W, in one small launch before it: X in the order of the decoded codes, and X A^T.

Four codes come out of each 16-bit unit of W at once, and unpack into four tiles: every fourth weight of a row, from the
first, second, third and fourth on. So of each group of 64, 128 or 256 inputs the GEMM wants first those with k = 0
modulo 4, then k = 1, and so on: whole lines of memory, that go to shared memory as they are. X A^T for the LoRA reads
all of X anyway; its K is shared among programs, which add up in the same launch.

It is short: what it takes is the way to memory, several times over, and its launch. So it starts while the kernel
before it ends, and has A, which nobody has read since the last step, brought into the L2 cache until X is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.arrivals import arrival_counters
from slothrl_kernels.switch import HAS_TRITON, interpreted, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    from slothrl_kernels.early_launch import ask_for, let_next_start, wait_for_last
    from slothrl_kernels.nf4_matmul_kernels import finish

MAX_SPLITS = 32  # programs to add up


@dataclass(frozen=True)
class InputsConfig:
    """One launch: at least `share` inputs a program, `block_n` rows of A (0: 16 or 32, by rank), warps and stages.

    Another share adds up in another order: the same bits every time, but not those of this one.
    """

    share: int = 256
    block_n: int = 0
    warps: int = 4
    stages: int = 2

    def splits(self, steps: int, group: int) -> int:
        """Programs that share K, none of them without work."""
        wanted = max(1, min(MAX_SPLITS, steps, steps * group // self.share))
        return -(-steps // -(-steps // wanted))


DEFAULT = InputsConfig()
# Worth timing (tests/gpu/bench_nf4_inputs.py); no tile of 64 x 64, see below.
CANDIDATES = (
    *(DEFAULT, InputsConfig(warps=2), InputsConfig(warps=8), InputsConfig(stages=3), InputsConfig(share=512)),
    *(InputsConfig(share=512, stages=3), InputsConfig(share=1024, stages=3), InputsConfig(block_n=16)),
)


@jit(do_not_specialize=["M", "splits"])
def nf4_inputs_kernel(
    x,
    ordered,
    a,
    xa,
    partials,
    arrived,
    M,
    N,
    K,
    splits,
    HAS_A: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    if EARLY:  # the GEMM, which asks for W meanwhile
        let_next_start()
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, GROUP)
    # Rows of A beyond the end read the last one's memory, tokens beyond the end nothing; neither is written.
    rows = a + tl.minimum(row, N - 1)[:, None] * K + k[None, :]
    place = tl.minimum(token, M - 1)[:, None] * K + k[None, :]
    there = (token < M)[:, None]
    written = (token < tl.where(tl.program_id(0) == 0, M, 0))[:, None]
    share = tl.cdiv(K // GROUP, splits)
    begin = tl.program_id(1) * share
    if FOLLOWS:
        if HAS_A:
            # Of each row the program's share, once for all tokens. A warp asks for one row after the other, so its
            # lanes share few: 128 / BLOCK_N of them a row, of which the first asks.
            LANES: tl.constexpr = 128 // BLOCK_N
            first = (tl.arange(0, LANES) == 0)[None, :] & (tl.program_id(2) == 0)
            size = tl.where(first, tl.minimum(share, K // GROUP - begin) * (GROUP * 2), 0)
            begins = tl.minimum(row, N - 1)[:, None] * K + begin * GROUP + tl.zeros([1, LANES], tl.int32)
            ask_for((a + begins).to(tl.int64) & -16, size)
        wait_for_last()
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(begin, tl.minimum(begin + share, K // GROUP)):
        tile = tl.load(x + place + step * GROUP, mask=there, other=0.0)
        fours = tl.permute(tl.reshape(tile, (BLOCK_M, GROUP // 4, 4)), (0, 2, 1))
        tl.store(ordered + place + step * GROUP, tl.reshape(fours, (BLOCK_M, GROUP)), mask=written)
        if HAS_A:
            left = tl.load(rows + step * GROUP)
            if INTERPRETED:  # it multiplies no bfloat16
                left, tile = left.to(tl.float32), tile.to(tl.float32)
            total = tl.dot(left, tl.trans(tile), total)
    if HAS_A:
        finish(
            total, xa, a, a, a, a, partials, arrived, row, token, M, N, splits,
            False, 0, 1, SPLIT, 8192 // (BLOCK_M * BLOCK_N), INTERPRETED,
        )  # fmt: skip


def nf4_inputs(
    x: Tensor,
    chunks: int,
    a: Tensor | None = None,
    arrived: Tensor | None = None,
    early: bool = False,
    follows: bool = False,
    config: InputsConfig = DEFAULT,
) -> tuple[Tensor, Tensor | None]:
    """X in groups of 64 * chunks inputs, each by k modulo 4, and X A^T summed in float32; Triton only.

    Args:
        x: (M, K) contiguous, bfloat16 or float16, K a multiple of 64 * chunks.
        a: (R, K) contiguous, of X's dtype, or None.
        arrived: int32 zeros that the caller keeps, zeros again afterwards; None: what is kept for the stream.
        early: the next launch on the stream is the GEMM, which may start at once (`early_launch`).
        follows: this launch may start before the last one on the stream has ended, whatever that was.

    Returns:
        (M, K) and (M, R), or None, of X's dtype.
    """
    (rows, inputs), group = x.shape, 64 * chunks
    rank = 0 if a is None else a.shape[0]
    # Many small programs: each waits for memory, and for the others. Tiles of 64 x 64 gave wrong sums on an H100 with
    # Triton 3.6, always: the multiplication is then Hopper's, of a tile also stored.
    block_m, block_n = 16, config.block_n or (16 if rank <= 16 else 32)
    splits = config.splits(inputs // group, group) if rank else inputs // group
    grid = (max(1, triton.cdiv(rank, block_n)), splits, triton.cdiv(rows, block_m))
    ordered, xa, partials, counters = torch.empty_like(x), x, x, x  # not touched without A
    if rank:
        xa = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
        partials = torch.empty(splits * rows * rank, dtype=torch.float32, device=x.device)
        counters = arrival_counters(x.device, grid[0] * grid[2], arrived)
    with torch.cuda.device_of(x):
        nf4_inputs_kernel[grid](
            *(x, ordered, x if a is None else a, xa, partials, counters),
            *(rows, max(1, rank), inputs, splits),
            HAS_A=rank > 0,
            INTERPRETED=interpreted(),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            GROUP=group,
            SPLIT=splits > 1,
            EARLY=early,
            FOLLOWS=follows,
            num_warps=config.warps,
            num_stages=config.stages,
            **({"launch_pdl": True} if follows else {}),
        )
    return ordered, xa if rank else None
