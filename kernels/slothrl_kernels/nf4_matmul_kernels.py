"""The kernels of `nf4_matmul`: tensor cores over tiles of weight rows and tokens, and a matrix-vector product.

Both compute Y^T = W X^T: the decoded weights never leave registers, and tokens are the narrow side. W comes in units of
4 weights and X in matching ones of 4 values; both are taken apart in registers, and equal places meet, so that nothing
is interleaved: k only has to be permuted alike on both sides. With splits > 1 the programs of a tile share K; each
leaves a float32 partial, and the last to arrive adds them in order, in the same launch and to the same bits every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.nf4_decode import decode_4, decode_8
from slothrl_kernels.nf4_dequantize import load_absmax
from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _halves(pairs, DTYPE: tl.constexpr):
    """32-bit integers -> their low and their high 16 bits as floats."""
    return pairs.to(tl.int16).to(DTYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@jit
def _quarters(fours, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """int64 -> its four 16-bit floats; float32 in the interpreter, which does no arithmetic in bfloat16."""
    a, b = _halves(fours.to(tl.int32), DTYPE)
    c, d = _halves((fours >> 32).to(tl.int32), DTYPE)
    if INTERPRETED:
        a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    return a, b, c, d


@jit
def _weights(
    units, code, scale, DTYPE: tl.constexpr, SCALE_FIRST: tl.constexpr, PTX: tl.constexpr, INTERPRETED: tl.constexpr
):
    """The four weights of each unit, times their rounded absmax if SCALE_FIRST."""
    a, b, c, d = decode_4(units, code, DTYPE, PTX)
    if INTERPRETED:
        a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    if SCALE_FIRST:
        factor = scale.to(DTYPE).to(a.dtype)
        a, b, c, d = a * factor, b * factor, c * factor, d * factor
    return a, b, c, d


@jit
def _lora(total, xa, lora_b, ends, row, token, M, RANK: tl.constexpr, SLICES: tl.constexpr, INTERPRETED: tl.constexpr):
    """(rows, tokens) sums plus B (X A^T)^T: `xa` is (M, SLICES * RANK), each slice of rows has its own RANK columns."""
    rank, slices = tl.arange(0, RANK), tl.zeros_like(row)
    for i in tl.static_range(SLICES - 1):  # pyright: ignore
        slices += (row >= tl.load(ends + i)).to(tl.int32)
    b = tl.load(lora_b + row.to(tl.int64)[:, None] * RANK + rank[None, :])
    width = SLICES * RANK
    if total.shape[1] == 1:
        a = tl.load(xa + token * width + slices[:, None] * RANK + rank[None, :])
        return total + tl.sum(b.to(tl.float32) * a.to(tl.float32), 1)[:, None]  # pyright: ignore
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


@jit(do_not_specialize=["M", "splits"])
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
    row_units,  # K / 4: 16-bit units in a row of W, 64-bit ones in a row of X
    row_chunks,  # K / 64
    splits,
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
    SCALE_FIRST: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.arange(0, 16)  # a chunk is 16 units of 4 weights
    # Rows and tokens beyond the end read the last one's memory, and are not written.
    near_row = tl.minimum(row, N - 1).to(tl.int64)  # 64 bits: N * K may pass 2**31
    units = packed + near_row[:, None] * row_units + place[None, :]
    tokens = x + tl.minimum(token, M - 1)[None, :] * row_units + place[:, None]
    first_chunk = near_row * row_chunks
    share = tl.cdiv(row_chunks // CHUNKS, splits)
    begin = tl.program_id(1) * share
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(begin, tl.minimum(begin + share, row_chunks // CHUNKS)):
        for turn in tl.static_range(CHUNKS):  # pyright: ignore
            chunk = step * CHUNKS + turn
            block = (first_chunk + chunk) // CHUNKS_A_BLOCK
            scale = load_absmax(absmax, block, inner_code, inner_absmax, offset, INNER_BLOCKSIZE)[:, None]
            p, q, r, s = _quarters(tl.load(tokens + chunk * 16), DTYPE, INTERPRETED)
            a, b, c, d = _weights(tl.load(units + chunk * 16), code, scale, DTYPE, SCALE_FIRST, PTX, INTERPRETED)
            if SCALE_FIRST:
                total = tl.dot(d, s, tl.dot(c, r, tl.dot(b, q, tl.dot(a, p, total))))
            else:
                total += tl.dot(d, s, tl.dot(c, r, tl.dot(b, q, tl.dot(a, p)))) * scale
    finish(
        total, y, bias, xa, lora_b, ends, partials, arrived, row, token, M, N, splits,
        HAS_BIAS, RANK, SLICES, SPLIT, INTERPRETED,
    )  # fmt: skip


@jit
def _add_two(total, pairs, first, second, DTYPE: tl.constexpr):
    """total plus two weights of each word, (rows, 8), times the two values of the token at `pairs`, (8,)."""
    even, odd = _halves(tl.load(pairs), DTYPE)
    total += first * even.to(tl.float32)[None, :]
    return total + second * odd.to(tl.float32)[None, :]


@jit(do_not_specialize=["M", "splits"])
def nf4_gemv_kernel(
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
    row_words,  # K / 8
    row_chunks,
    splits,
    DTYPE: tl.constexpr,
    CHUNKS_A_BLOCK: tl.constexpr,
    INNER_BLOCKSIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The same for one token a program, in float32 without tensor cores."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) + tl.arange(0, 1)
    place = tl.arange(0, 8)  # a chunk is 8 words of 8 weights
    near_row = tl.minimum(row, N - 1).to(tl.int64)
    words = packed + near_row[:, None] * row_words + place[None, :]
    pairs = x + tl.program_id(2) * row_words * 4 + place * 4
    first_chunk = near_row * row_chunks
    share = tl.cdiv(row_chunks // CHUNKS, splits)
    begin = tl.program_id(1) * share
    total = tl.zeros([BLOCK_N, 8], tl.float32)
    for step in range(begin, tl.minimum(begin + share, row_chunks // CHUNKS)):
        for turn in tl.static_range(CHUNKS):  # pyright: ignore
            chunk = step * CHUNKS + turn
            a, b, c, d, e, f, g, h = decode_8(tl.load(words + chunk * 8), code, PTX)
            product = _add_two(tl.zeros([BLOCK_N, 8], tl.float32), pairs + chunk * 32, a, b, DTYPE)
            product = _add_two(product, pairs + chunk * 32 + 1, c, d, DTYPE)
            product = _add_two(product, pairs + chunk * 32 + 2, e, f, DTYPE)
            product = _add_two(product, pairs + chunk * 32 + 3, g, h, DTYPE)
            block = (first_chunk + chunk) // CHUNKS_A_BLOCK
            total += product * load_absmax(absmax, block, inner_code, inner_absmax, offset, INNER_BLOCKSIZE)[:, None]
    total = tl.sum(total, 1)[:, None]  # pyright: ignore
    finish(
        total, y, bias, xa, lora_b, ends, partials, arrived, row, token, M, N, splits,
        HAS_BIAS, RANK, SLICES, SPLIT, False,
    )  # fmt: skip
