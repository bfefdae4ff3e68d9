"""X A^T for few tokens and few rows of A: K is shared among programs, which add up in the same launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.nf4_matmul import arrival_counters
from slothrl_kernels.switch import HAS_TRITON, interpreted, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    from slothrl_kernels.nf4_matmul_kernels import finish


@jit(do_not_specialize=["M", "splits"])
def lora_shrink_kernel(
    x,
    a,
    y,
    partials,
    arrived,
    M,
    N,
    K,
    splits,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # Rows and tokens beyond the end read the last one's memory, and are not written.
    rows = a + tl.minimum(row, N - 1)[:, None] * K + k[None, :]
    tokens = x + tl.minimum(token, M - 1)[None, :] * K + k[:, None]
    share = tl.cdiv(K // BLOCK_K, splits)
    begin = tl.program_id(1) * share
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(begin, tl.minimum(begin + share, K // BLOCK_K)):
        left, right = tl.load(rows + step * BLOCK_K), tl.load(tokens + step * BLOCK_K)
        if INTERPRETED:  # it multiplies no bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total)
    finish(total, y, a, a, a, a, partials, arrived, row, token, M, N, splits, False, 0, 1, SPLIT, INTERPRETED)


def lora_shrink(x: Tensor, a: Tensor, arrived: Tensor | None = None) -> Tensor:
    """X A^T of X's dtype, summed in float32; Triton only (torch's is `torch.nn.functional.linear`).

    Args:
        x: (M, K) contiguous, bfloat16 or float16, K a multiple of 64.
        a: (R, K) contiguous, of X's dtype.
        arrived: int32 zeros that the caller keeps, zeros again afterwards; None: what `nf4_matmul` keeps by stream.
    """
    (rows, inputs), rank = x.shape, a.shape[0]
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    block_n = min(64, triton.next_power_of_2(rank))
    block_k = 128 if inputs % 128 == 0 and block_m <= 32 else 64
    splits = max(1, min(32, inputs // block_k // 4))
    grid = (triton.cdiv(rank, block_n), splits, triton.cdiv(rows, block_m))
    y = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    partials = torch.empty(splits * rows * rank, dtype=torch.float32, device=x.device)
    arrived = arrival_counters(x.device, grid[0] * grid[2], arrived)
    with torch.cuda.device_of(x):
        lora_shrink_kernel[grid](
            x,
            a,
            y,
            partials,
            arrived,
            rows,
            rank,
            inputs,
            splits,
            INTERPRETED=interpreted(),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            SPLIT=splits > 1,
            num_warps=4,
            num_stages=3,
        )
    return y
