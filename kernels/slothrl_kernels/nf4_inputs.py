"""What the nf4 GEMM reads besides W, in one small launch before it: X in the order of the decoded codes, and X A^T.

Four codes come out of each 16-bit unit of W at once, and unpack into four tiles: every fourth weight of a row, from the
first, second, third and fourth on. So of each group of 64, 128 or 256 inputs the GEMM wants first those with k = 0
modulo 4, then k = 1, and so on: whole lines of memory, that go to shared memory as they are. X A^T for the LoRA reads
all of X anyway; its K is shared among programs, which add up in the same launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.arrivals import arrival_counters
from slothrl_kernels.switch import HAS_TRITON, interpreted, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    from slothrl_kernels.early_launch import let_next_start
    from slothrl_kernels.nf4_matmul_kernels import finish

SHARE = 256  # inputs a program, where that leaves no more than 32 programs to add up


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
):
    if EARLY:  # the GEMM, which asks for W meanwhile
        let_next_start()
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, GROUP)
    # Rows and tokens beyond the end read the last one's memory, and are not written.
    rows = a + tl.minimum(row, N - 1)[:, None] * K + k[None, :]
    place = tl.minimum(token, M - 1)[:, None] * K + k[None, :]
    written = (token < tl.where(tl.program_id(0) == 0, M, 0))[:, None]
    share = tl.cdiv(K // GROUP, splits)
    begin = tl.program_id(1) * share
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(begin, tl.minimum(begin + share, K // GROUP)):
        tile = tl.load(x + place + step * GROUP)
        fours = tl.permute(tl.reshape(tile, (BLOCK_M, GROUP // 4, 4)), (0, 2, 1))
        tl.store(ordered + place + step * GROUP, tl.reshape(fours, (BLOCK_M, GROUP)), mask=written)
        if HAS_A:
            left = tl.load(rows + step * GROUP)
            if INTERPRETED:  # it multiplies no bfloat16
                left, tile = left.to(tl.float32), tile.to(tl.float32)
            total = tl.dot(left, tl.trans(tile), total)
    if HAS_A:
        finish(total, xa, a, a, a, a, partials, arrived, row, token, M, N, splits, False, 0, 1, SPLIT, INTERPRETED)


def nf4_inputs(
    x: Tensor, chunks: int, a: Tensor | None = None, arrived: Tensor | None = None, early: bool = False
) -> tuple[Tensor, Tensor | None]:
    """X in groups of 64 * chunks inputs, each by k modulo 4, and X A^T summed in float32; Triton only.

    Args:
        x: (M, K) contiguous, bfloat16 or float16, K a multiple of 64 * chunks.
        a: (R, K) contiguous, of X's dtype, or None.
        arrived: int32 zeros that the caller keeps, zeros again afterwards; None: what is kept for the stream.
        early: the next launch on the stream is the GEMM, which may start at once (`early_launch`).

    Returns:
        (M, K) and (M, R), or None, of X's dtype.
    """
    (rows, inputs), group = x.shape, 64 * chunks
    rank = 0 if a is None else a.shape[0]
    # Many small programs: each waits for memory, and for the others. Tiles of 64 x 64 gave wrong sums on an H100 with
    # Triton 3.6, always: the multiplication is then Hopper's, of a tile also stored.
    block_m, block_n = 16, 16 if rank <= 16 else 32
    steps = inputs // group
    splits = max(1, min(32, steps, inputs // SHARE)) if rank else steps
    grid = (max(1, triton.cdiv(rank, block_n)), splits, triton.cdiv(rows, block_m))
    ordered, xa, partials, counters = torch.empty_like(x), x, x, x  # not touched without A
    if rank:
        xa = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
        partials = torch.empty(splits * rows * rank, dtype=torch.float32, device=x.device)
        counters = arrival_counters(x.device, grid[0] * grid[2], arrived)
    with torch.cuda.device_of(x):
        nf4_inputs_kernel[grid](
            x,
            ordered,
            x if a is None else a,
            xa,
            partials,
            counters,
            rows,
            max(1, rank),
            inputs,
            splits,
            HAS_A=rank > 0,
            INTERPRETED=interpreted(),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            GROUP=group,
            SPLIT=splits > 1,
            EARLY=early,
            num_warps=4,
            num_stages=2,
        )
    return ordered, xa if rank else None
