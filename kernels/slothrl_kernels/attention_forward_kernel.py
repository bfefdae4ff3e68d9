"""The forward kernel of packed attention: one program a block of queries of one head, online softmax over its keys.

The recurrence is FlashAttention-2's (Dao, arXiv:2307.08691, algorithm 1). What is ours is the walk: first the parent's
keys, then the segment's own up to the diagonal; only blocks at an edge are masked, or all of them under a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.attention_tiles import add_dot, bend, dot, load_tile, store_tile, visible
from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _attend(
    total,
    weight,
    top,
    queries,
    query_positions,
    k,
    v,
    k_token,
    v_token,
    parent,
    parent_last,
    own,
    own_last,
    origin,
    shift,
    window,
    inner,
    outer,
    head_size,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Keys parent..parent_last at positions token + origin, own..own_last at token + shift; whole blocks unless MASKED.

    One loop over both: filling a loop's pipeline of loads takes as long as half a block's products, and a segment of
    1,024 tokens has not many blocks.

    total (BLOCK_M, WIDTH): sum of exp2(s2 - top) v; weight (BLOCK_M,): of exp2(s2 - top); top: the largest s2 so far,
    s2 = x outer.
    """
    ahead = tl.cdiv(tl.maximum(parent_last - parent, 0), BLOCK_N)  # blocks of the parent; its window may be past it
    for i in range(ahead + tl.cdiv(own_last - own, BLOCK_N)):
        start = tl.where(i < ahead, parent, own - ahead * BLOCK_N) + i * BLOCK_N
        last = tl.where(i < ahead, parent_last, own_last)
        keys = load_tile(k, start, k_token, last, head_size, BLOCK_N, WIDTH, MASKED, EVEN)
        scores = bend(dot(queries, tl.trans(keys), INTERPRETED), inner, SOFTCAP)
        if MASKED:
            tokens = start + tl.arange(0, BLOCK_N)[None, :]
            key_positions = tokens + tl.where(i < ahead, origin, shift)
            seen = visible(query_positions[:, None], key_positions, window, WINDOW) & (tokens < last)
            scores = tl.where(seen, scores, float("-inf"))  # top is finite: a row that sees nothing here adds 0
        new_top = tl.maximum(top, tl.max(scores, 1) * outer)
        weights = tl.exp2(scores * outer - new_top[:, None])
        decay = tl.exp2(top - new_top)
        weight = weight * decay + tl.sum(weights, 1)
        values = load_tile(v, start, v_token, last, head_size, BLOCK_N, WIDTH, MASKED, EVEN)
        total = add_dot(total * decay[:, None], weights.to(values.dtype), values, INTERPRETED)
        top = new_top
    return total, weight, top


@jit(do_not_specialize=["tokens", "window"])
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    blocks,
    positions,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    tokens,
    heads,
    group,
    window,
    inner,
    outer,
    head_size,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out (T, Hq, d) and lse (Hq, T), natural; `blocks` as `query_blocks` of attention_blocks.py writes them."""
    head = (tl.program_id(0) % heads).to(tl.int64)  # heads of one group side by side: they read the same keys
    block = blocks + tl.program_id(0) // heads * 8
    first, end, own, shift = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    parent, parent_end = tl.load(block + 4), tl.load(block + 5)
    q, out, lse = q + head * q_head, out + head * out_head, lse + head * tokens
    k, v = k + head // group * k_head, v + head // group * v_head
    rows = first + tl.arange(0, BLOCK_M)
    queries = load_tile(q, first, q_token, end, head_size, BLOCK_M, WIDTH, True, EVEN)
    query_positions = tl.load(positions + rows, mask=rows < end, other=0).to(tl.int32)
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -1.0e38, tl.float32)
    last = tl.minimum(first + BLOCK_M, end)
    if WINDOW:
        start = tl.maximum(parent, parent + first + shift - window + 1)
        own_start = tl.maximum(own, first - window + 1)
        parent_masked, own_masked = start, own_start
    else:
        start, own_start = parent, own
        parent_masked = parent + (parent_end - parent) // BLOCK_N * BLOCK_N
        own_masked = own + (first + 1 - own) // BLOCK_N * BLOCK_N  # blocks up to the first query: seen by every row
        total, weight, top = _attend(
            total, weight, top, queries, query_positions, k, v, k_token, v_token, start, parent_masked, own_start,
            own_masked, -parent, shift, window, inner, outer, head_size, False, WINDOW, SOFTCAP, BLOCK_N, WIDTH, EVEN,
            INTERPRETED,
        )  # fmt: skip
    total, weight, top = _attend(
        total, weight, top, queries, query_positions, k, v, k_token, v_token, parent_masked, parent_end, own_masked,
        last, -parent, shift, window, inner, outer, head_size, True, WINDOW, SOFTCAP, BLOCK_N, WIDTH, EVEN, INTERPRETED,
    )  # fmt: skip
    store_tile(out, total / weight[:, None], first, out_token, end, head_size, BLOCK_M, WIDTH)
    tl.store(lse + rows, (top + tl.log2(weight)) * 0.6931471805599453, mask=rows < end)
