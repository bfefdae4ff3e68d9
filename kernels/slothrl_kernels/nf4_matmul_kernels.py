"""The kernel of `nf4_matmul`: tensor cores over tiles of weight rows and tokens.

It computes Y^T = W X^T: the decoded weights never leave registers, and tokens are the narrow side. Of each step's units
of 4 weights the first weights are one tile, the second ones another, and so on; X comes in that order (`nf4_inputs`),
so that nothing is interleaved, and W's and X's rows are read in runs of 64 bytes and more: runs of 32, one sector, cost
more than the decoding. With splits > 1 the programs of a tile share K; each leaves a float32 partial, and the last to
arrive adds them in order, in the same launch and to the same bits every time. Or programs take equal shares of all
tiles' steps, so that no multiprocessor is left without work (`nf4_shares`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.early_launch import ask_for, wait_for_last
from slothrl_kernels.nf4_decode import decode_4
from slothrl_kernels.nf4_dequantize import load_absmax
from slothrl_kernels.nf4_shares import collect, share_begin
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
def _gather(total, partials, address, inside, size, splits, AHEAD: tl.constexpr):
    """The sum of all splits' partials, in order, AHEAD loads under way at a time."""
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
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, SLICES: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a tile of Y from (rows, tokens) sums; of all the programs that share the tile the last one does.

    AHEAD: how many of their partials it reads at a time; each time takes as long as memory takes to answer.
    """
    address = token.to(tl.int64)[None, :] * N + row[:, None]
    inside = (token[None, :] < M) & (row[:, None] < N)
    near = tl.minimum(row, N - 1)
    if SPLIT:
        size = M.to(tl.int64) * N
        tl.store(partials + tl.program_id(1) * size + address, total, mask=inside)
        tl.debug_barrier()  # all threads' partials come before the one thread's arrival
        tile = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(tile, 1, sem="acq_rel") == splits - 1:
            total = _gather(total, partials, address, inside, size, splits, AHEAD)
            _write(
                total, y, address, inside, bias, xa, lora_b, ends, near, token, M, HAS_BIAS, RANK, SLICES, INTERPRETED
            )
            tl.store(tile, 0)  # as the next launch needs it
    else:
        _write(total, y, address, inside, bias, xa, lora_b, ends, near, token, M, HAS_BIAS, RANK, SLICES, INTERPRETED)


@jit
def _sums(
    x, packed, absmax, code, inner_code, inner_absmax, offset, row, token, begin, count, turn, M, N, K,
    row_units, row_chunks,
    DTYPE: tl.constexpr, CHUNKS_A_BLOCK: tl.constexpr, INNER_BLOCKSIZE: tl.constexpr, PTX: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(rows, tokens) sums over `count` steps of K from `begin` on, the first of them `begin + turn`."""
    UNITS: tl.constexpr = 16 * CHUNKS
    place = tl.arange(0, UNITS)
    # Rows beyond the end read the last one's memory, and are not written.
    near_row = tl.minimum(row, N - 1).to(tl.int64)  # 64 bits: N * K may pass 2**31
    units = packed + near_row[:, None] * row_units + place[None, :]
    # Tokens beyond the end are not read: all programs would ask for the last one's line at the same time.
    there = (token < M)[None, :]
    tokens = x + tl.minimum(token, M - 1)[None, :] * K + tl.arange(0, 4 * UNITS // PARTS)[:, None]
    chunk = (near_row * row_chunks)[:, None] + tl.arange(0, CHUNKS)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in range(count):
        step = begin + tl.where(i + turn < count, i + turn, i + turn - count)
        block = (chunk + step * CHUNKS) // CHUNKS_A_BLOCK
        scale = load_absmax(absmax, block, inner_code, inner_absmax, offset, INNER_BLOCKSIZE)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, CHUNKS, 16)), (BLOCK_N, UNITS))
        a, b, c, d = decode_4(tl.load(units + step * UNITS), scale, code, DTYPE, PTX, INTERPRETED)
        step_tokens = tokens + step * (4 * UNITS)
        total = _multiply_step(a, b, c, d, step_tokens, there, total, PARTS, PTX, INTERPRETED)
    return total


@jit
def _ask(packed, row, N, row_units, step, count, ahead, UNITS: tl.constexpr):
    """Asks for the first bytes of `count` steps of each row of W, then waits for X."""
    near_row = tl.minimum(row, N - 1).to(tl.int64)
    ask_for(packed + near_row * row_units + step * UNITS, tl.minimum(ahead, count * 2 * UNITS))
    wait_for_last()


@jit
def _shares(
    x, packed, absmax, code, inner_code, inner_absmax, offset, bias, xa, lora_b, ends, y, partials, arrived,
    M, N, K, row_units, row_chunks, ahead,
    DTYPE: tl.constexpr, CHUNKS_A_BLOCK: tl.constexpr, INNER_BLOCKSIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr, SLICES: tl.constexpr, PTX: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr, FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """A program's share of the line of all tiles' steps; tiles of the same rows of W follow each other."""
    steps = row_chunks // CHUNKS
    token_tiles = tl.cdiv(M, BLOCK_M)
    units = tl.cdiv(N, BLOCK_N) * token_tiles * steps
    program, programs = tl.program_id(0), tl.num_programs(0)
    unit, end = share_begin(program, programs, units), share_begin(program + 1, programs, units)
    if EARLY:
        row = unit // steps // token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        _ask(packed, row, N, row_units, unit % steps, tl.minimum(end - unit, steps - unit % steps), ahead, 16 * CHUNKS)
    for tile in range(unit // steps, (end - 1) // steps + 1):
        begin = tl.maximum(unit - tile * steps, 0)
        count = tl.minimum(end - tile * steps, steps) - begin
        row = tile // token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tile % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        total = _sums(
            x, packed, absmax, code, inner_code, inner_absmax, offset, row, token, begin, count, 0, M, N, K,
            row_units, row_chunks,
            DTYPE, CHUNKS_A_BLOCK, INNER_BLOCKSIZE, PTX, INTERPRETED, BLOCK_M, BLOCK_N, CHUNKS, PARTS,
        )  # fmt: skip
        whole = (count == steps).to(tl.int32)
        if whole == 0:
            total, whole = collect(
                total, partials, arrived, tile, begin, steps, program, programs, units, FRAGMENTS,
            )  # fmt: skip
        if whole == 1:
            address = token.to(tl.int64)[None, :] * N + row[:, None]
            inside = (token[None, :] < M) & (row[:, None] < N)
            _write(
                total, y, address, inside, bias, xa, lora_b, ends, tl.minimum(row, N - 1), token, M,
                HAS_BIAS, RANK, SLICES, INTERPRETED,
            )  # fmt: skip


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
    SHARES: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    if SHARES:
        _shares(
            x, packed, absmax, code, inner_code, inner_absmax, offset, bias, xa, lora_b, ends, y, partials, arrived,
            M, N, K, row_units, row_chunks, ahead,
            DTYPE, CHUNKS_A_BLOCK, INNER_BLOCKSIZE, HAS_BIAS, RANK, SLICES, PTX, INTERPRETED, BLOCK_M, BLOCK_N, CHUNKS,
            PARTS, EARLY, FRAGMENTS,
        )  # fmt: skip
    else:
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        share = tl.cdiv(row_chunks // CHUNKS, splits)
        begin = tl.program_id(1) * share
        count = tl.minimum(share, row_chunks // CHUNKS - begin)  # none where splits do not divide K
        turn = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) % turns * count // turns
        if EARLY:
            _ask(packed, row, N, row_units, begin + turn, count - turn, ahead, 16 * CHUNKS)
        total = _sums(
            x, packed, absmax, code, inner_code, inner_absmax, offset, row, token, begin, count, turn, M, N, K,
            row_units, row_chunks,
            DTYPE, CHUNKS_A_BLOCK, INNER_BLOCKSIZE, PTX, INTERPRETED, BLOCK_M, BLOCK_N, CHUNKS, PARTS,
        )  # fmt: skip
        # Large tiles have no registers for more: they would spill, or leave room for one program only instead of two.
        finish(
            total, y, bias, xa, lora_b, ends, partials, arrived, row, token, M, N, splits,
            HAS_BIAS, RANK, SLICES, SPLIT, 4 if BLOCK_M * BLOCK_N <= 2048 else 1, INTERPRETED,
        )  # fmt: skip
