"""The kernel of `nf4_matmul`: tensor cores over tiles of weight rows and tokens.

It computes Y^T = W X^T: the decoded weights never leave registers, and tokens are the narrow side. Of each step's units
of 4 weights the first weights are one tile, the second ones another, and so on; X comes in that order (`nf4_inputs`),
so that nothing is interleaved, and W's and X's rows are read in runs of 64 bytes and more: runs of 32, one sector, cost
more than the decoding. With splits > 1 the programs of a tile share K; each leaves a float32 partial, and the last to
arrive adds them in order, in the same launch and to the same bits every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.early_launch import ask_for, wait_for_last
from slothrl_kernels.nf4_decode import decode_4
from slothrl_kernels.nf4_dequantize import load_absmax
from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _multiply(weights, tokens, there, total, INTERPRETED: tl.constexpr):
    tile = tl.load(tokens, mask=there, other=0.0)
    return tl.dot(weights, tile.to(tl.float32) if INTERPRETED else tile, total)


@jit
def _settled(total):
    """The sums as they are, but done: Triton waits for Hopper's multiplications before another instruction reads them.

    Left to run on into the next turn of the loop, they make ptxas (12.8) wait after each single instruction of all of
    them: "wgmma.mma_async instructions are serialized". The copy itself costs nothing.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1)


@jit
def _multiply_step(
    a, b, c, d, tokens, there, total,
    PARTS: tl.constexpr, PTX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the four tiles of a step's weights times its tokens, in one, two or four multiplications.

    tokens: addresses of the first multiplication's; the others' follow. Fewer multiplications wait less and read longer
    rows, but need more registers.
    """
    ROWS: tl.constexpr = a.shape[0]  # pyright: ignore
    UNITS: tl.constexpr = a.shape[1]  # pyright: ignore
    if PARTS == 4:
        total = _multiply(a, tokens, there, total, INTERPRETED)
        total = _multiply(b, tokens + UNITS, there, total, INTERPRETED)
        total = _multiply(c, tokens + 2 * UNITS, there, total, INTERPRETED)
        total = _multiply(d, tokens + 3 * UNITS, there, total, INTERPRETED)
    elif PARTS == 2:
        first = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, 2 * UNITS))
        second = tl.reshape(tl.permute(tl.join(c, d), (0, 2, 1)), (ROWS, 2 * UNITS))
        total = _multiply(first, tokens, there, total, INTERPRETED)
        total = _multiply(second, tokens + 2 * UNITS, there, total, INTERPRETED)
    else:
        weights = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
        weights = tl.reshape(weights, (ROWS, 4 * UNITS))
        total = _multiply(weights, tokens, there, total, INTERPRETED)
    return _settled(total) if PTX else total


@jit
def _lora(total, xa, lora_b, ends, row, token, M, RANK: tl.constexpr, SLICES: tl.constexpr, INTERPRETED: tl.constexpr):
    """(rows, tokens) sums plus B (X A^T)^T: `xa` is (M, SLICES * RANK), each slice of rows has its own RANK columns."""
    rank, slices = tl.arange(0, RANK), tl.zeros_like(row)
    for i in tl.static_range(SLICES - 1):  # pyright: ignore
        slices += (row >= tl.load(ends + i)).to(tl.int32)
    b = tl.load(lora_b + row.to(tl.int64)[:, None] * RANK + rank[None, :])
    width = SLICES * RANK
    near = tl.minimum(token, M - 1).to(tl.int64)
    for i in tl.static_range(SLICES):  # pyright: ignore
        a = tl.load(xa + near[None, :] * width + i * RANK + rank[:, None])
        part = tl.where(slices[:, None] == i, b, 0.0)
        if INTERPRETED:
            total += tl.dot(part.to(tl.float32), a.to(tl.float32))
        else:
            total += tl.dot(part.to(a.dtype), a)
    return total


@jit
def _gather(total, partials, address, inside, size, splits):
    """The sum of all splits' partials, in order; of small tiles four loads at a time are under way.

    Large tiles have no registers for that: they would spill, or leave room for one program only where there are two.
    """
    AHEAD: tl.constexpr = 4 if total.numel <= 2048 else 1  # pyright: ignore
    total = tl.zeros_like(total)
    partials += address
    for split in range(0, splits, AHEAD):
        for i in tl.static_range(AHEAD):  # pyright: ignore
            there = inside & (tl.zeros([1, 1], tl.int32) + (split + i) < splits)
            # Past L1, which is not coherent.
            total += tl.load(partials + (split + i) * size, mask=there, other=0.0, cache_modifier=".cg")
    return total


@jit
def _write(
    total, y, address, inside, bias, xa, lora_b, ends, row, token, M,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, SLICES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    if RANK:
        total = _lora(total, xa, lora_b, ends, row, token, M, RANK, SLICES, INTERPRETED)
    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    tl.store(y + address, total.to(y.dtype.element_ty), mask=inside)


@jit
def finish(
    total, y, bias, xa, lora_b, ends, partials, arrived, row, token, M, N, splits,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, SLICES: tl.constexpr, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a tile of Y from (rows, tokens) sums; of all the programs that share the tile the last one does."""
    address = token.to(tl.int64)[None, :] * N + row[:, None]
    inside = (token[None, :] < M) & (row[:, None] < N)
    near = tl.minimum(row, N - 1)
    if SPLIT:
        size = M.to(tl.int64) * N
        tl.store(partials + tl.program_id(1) * size + address, total, mask=inside)
        tl.debug_barrier()  # all threads' partials come before the one thread's arrival
        tile = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(tile, 1, sem="acq_rel") == splits - 1:
            total = _gather(total, partials, address, inside, size, splits)
            _write(
                total, y, address, inside, bias, xa, lora_b, ends, near, token, M, HAS_BIAS, RANK, SLICES, INTERPRETED
            )
            tl.store(tile, 0)  # as the next launch needs it
    else:
        _write(total, y, address, inside, bias, xa, lora_b, ends, near, token, M, HAS_BIAS, RANK, SLICES, INTERPRETED)


@jit(do_not_specialize=["M", "splits", "ahead", "turns"])
def nf4_gemm_kernel(
    x,
    packed,
    absmax,
    code,
    inner_code,
    inner_absmax,
    offset,
    bias,
    xa,
    lora_b,
    ends,
    y,
    partials,
    arrived,
    M,
    N,
    K,
    row_units,  # K / 4: 16-bit units in a row of W
    row_chunks,  # K / 64
    splits,
    ahead,  # bytes of each row of W to ask for before X is there
    turns,  # at how many places of their share of K programs begin, one after the other
    DTYPE: tl.constexpr,
    CHUNKS_A_BLOCK: tl.constexpr,
    INNER_BLOCKSIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    PTX: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    UNITS: tl.constexpr = 16 * CHUNKS
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.arange(0, UNITS)
    # Rows beyond the end read the last one's memory, and are not written.
    near_row = tl.minimum(row, N - 1).to(tl.int64)  # 64 bits: N * K may pass 2**31
    units = packed + near_row[:, None] * row_units + place[None, :]
    # Tokens beyond the end are not read: all programs would ask for the last one's line at the same time.
    there = (token < M)[None, :]
    tokens = x + tl.minimum(token, M - 1)[None, :] * K + tl.arange(0, 4 * UNITS // PARTS)[:, None]
    chunk = (near_row * row_chunks)[:, None] + tl.arange(0, CHUNKS)[None, :]
    share = tl.cdiv(row_chunks // CHUNKS, splits)
    begin = tl.program_id(1) * share
    count = tl.minimum(share, row_chunks // CHUNKS - begin)  # none where splits do not divide K
    turn = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) % turns * count // turns
    if EARLY:
        ask_for(packed + near_row * row_units + (begin + turn) * UNITS, tl.minimum(ahead, (count - turn) * 2 * UNITS))
        wait_for_last()
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in range(count):
        step = begin + tl.where(i + turn < count, i + turn, i + turn - count)
        block = (chunk + step * CHUNKS) // CHUNKS_A_BLOCK
        scale = load_absmax(absmax, block, inner_code, inner_absmax, offset, INNER_BLOCKSIZE)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, CHUNKS, 16)), (BLOCK_N, UNITS))
        a, b, c, d = decode_4(tl.load(units + step * UNITS), scale, code, DTYPE, PTX, INTERPRETED)
        step_tokens = tokens + step * (4 * UNITS)
        total = _multiply_step(a, b, c, d, step_tokens, there, total, PARTS, PTX, INTERPRETED)
    finish(
        total, y, bias, xa, lora_b, ends, partials, arrived, row, token, M, N, splits,
        HAS_BIAS, RANK, SLICES, SPLIT, INTERPRETED,
    )  # fmt: skip
