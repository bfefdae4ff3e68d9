"""The backward kernels of packed attention (Dao, arXiv:2307.08691, algorithm 2), each gradient summed by one program.

With P = exp(S - lse) and delta = rowsum(dO * O):  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = dS K,  dK = dS^T Q.

One kernel sums dQ over keys, the other dK and dV over queries and over the heads that read them, so that nothing is
added atomically and the same inputs give the same bits. A prefix that many children read has more queries than one
program should walk: its gradients come in parts (`key_blocks` in attention_blocks.py), added afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.attention_tiles import add_dot, bend, dot, load_tile, store_tile, unbend, visible
from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit(do_not_specialize=["tokens"])
def attention_delta_kernel(
    out, gradient, delta, out_token, out_head, tokens, heads, head_size, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """delta (Hq, T) from out and its gradient, both (T, Hq, d) of the same strides."""
    head, first = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads * BLOCK
    rows = first + tl.arange(0, BLOCK)
    a = load_tile(out + head * out_head, first, out_token, tokens, head_size, BLOCK, WIDTH, True, False)
    b = load_tile(gradient + head * out_head, first, out_token, tokens, head_size, BLOCK, WIDTH, True, False)
    tl.store(delta + head * tokens + rows, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), rows < tokens)


@jit
def _sum_over_keys(
    total,
    queries,
    gradients,
    lse,
    delta,
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
    """total (BLOCK_M, WIDTH) += dS K over the keys that the forward's `_attend` walks over; lse in base 2."""
    ahead = tl.cdiv(tl.maximum(parent_last - parent, 0), BLOCK_N)
    for i in range(ahead + tl.cdiv(own_last - own, BLOCK_N)):
        start = tl.where(i < ahead, parent, own - ahead * BLOCK_N) + i * BLOCK_N
        last = tl.where(i < ahead, parent_last, own_last)
        keys = load_tile(k, start, k_token, last, head_size, BLOCK_N, WIDTH, MASKED, EVEN)
        values = load_tile(v, start, v_token, last, head_size, BLOCK_N, WIDTH, MASKED, EVEN)
        scores = bend(dot(queries, tl.trans(keys), INTERPRETED), inner, SOFTCAP)
        weights = tl.exp2(scores * outer - lse[:, None])
        if MASKED:
            tokens = start + tl.arange(0, BLOCK_N)[None, :]
            key_positions = tokens + tl.where(i < ahead, origin, shift)
            seen = visible(query_positions[:, None], key_positions, window, WINDOW) & (tokens < last)
            weights = tl.where(seen, weights, 0.0)
        slopes = weights * (dot(gradients, tl.trans(values), INTERPRETED) - delta[:, None])
        slopes = unbend(slopes, scores, SOFTCAP)
        total = add_dot(total, slopes.to(keys.dtype), keys, INTERPRETED)
    return total


@jit(do_not_specialize=["tokens", "window"])
def attention_query_gradient_kernel(
    q,
    k,
    v,
    gradient,
    lse,
    delta,
    dq,
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
    scale,
    head_size,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dq (T, Hq, d), strides as of the output's gradient; the walk over keys is the forward kernel's."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = blocks + tl.program_id(0) // heads * 8
    first, end, own, shift = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    parent, parent_end = tl.load(block + 4), tl.load(block + 5)
    q, gradient, dq = q + head * q_head, gradient + head * out_head, dq + head * out_head
    k, v = k + head // group * k_head, v + head // group * v_head
    lse, delta = lse + head * tokens, delta + head * tokens
    rows = first + tl.arange(0, BLOCK_M)
    queries = load_tile(q, first, q_token, end, head_size, BLOCK_M, WIDTH, True, EVEN)
    gradients = load_tile(gradient, first, out_token, end, head_size, BLOCK_M, WIDTH, True, EVEN)
    query_positions = tl.load(positions + rows, mask=rows < end, other=0).to(tl.int32)
    lses = tl.load(lse + rows, mask=rows < end, other=0.0) * 1.4426950408889634
    deltas = tl.load(delta + rows, mask=rows < end, other=0.0)
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    last = tl.minimum(first + BLOCK_M, end)
    if WINDOW:
        parent_masked = tl.maximum(parent, parent + first + shift - window + 1)
        own_masked = tl.maximum(own, first - window + 1)
    else:
        parent_masked = parent + (parent_end - parent) // BLOCK_N * BLOCK_N
        own_masked = own + (first + 1 - own) // BLOCK_N * BLOCK_N
        total = _sum_over_keys(
            total, queries, gradients, lses, deltas, query_positions, k, v, k_token, v_token, parent, parent_masked,
            own, own_masked, -parent, shift, window, inner, outer, head_size, False, WINDOW, SOFTCAP, BLOCK_N, WIDTH,
            EVEN, INTERPRETED,
        )  # fmt: skip
    total = _sum_over_keys(
        total, queries, gradients, lses, deltas, query_positions, k, v, k_token, v_token, parent_masked, parent_end,
        own_masked, last, -parent, shift, window, inner, outer, head_size, True, WINDOW, SOFTCAP, BLOCK_N, WIDTH, EVEN,
        INTERPRETED,
    )  # fmt: skip
    store_tile(dq, total * scale, first, out_token, end, head_size, BLOCK_M, WIDTH)


@jit
def _along_columns(pointer, tokens, last, BLOCK_M: tl.constexpr):
    """pointer[tokens], 0 from `last` on, each loaded some times over.

    Triton counts a load of fewer elements than threads as cheap, and gives each thread all that its columns need: 16
    addresses in registers here, which then spill. A load of 512 it does once.
    """
    same = tl.zeros([1, 512 // BLOCK_M], tl.int32)
    return tl.max(tl.load(pointer + tokens[:, None] + same, mask=tokens[:, None] + same < last, other=0), 1)


@jit
def _sum_over_queries(
    dk,
    dv,
    keys,
    values,
    key_positions,
    q,
    gradient,
    lse,
    delta,
    positions,
    q_token,
    q_head,
    out_token,
    out_head,
    tokens,
    share,
    first,
    last,
    window,
    inner,
    outer,
    head_size,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dk, dv (BLOCK_N, WIDTH) += dS^T Q, P^T dO over queries first..last of `share` heads; zeros past the end.

    One loop over all heads, so that its pipeline of loads is filled once; ptxas spills less of it, too.
    """
    count = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    for i in range(count * share):
        turn, start = (i // count).to(tl.int64), first + i % count * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        queries = load_tile(q + turn * q_head, start, q_token, last, head_size, BLOCK_M, WIDTH, True, EVEN)
        gradients = load_tile(gradient + turn * out_head, start, out_token, last, head_size, BLOCK_M, WIDTH, True, EVEN)
        lses = _along_columns(lse + turn * tokens, rows, last, BLOCK_M) * 1.4426950408889634
        deltas = _along_columns(delta + turn * tokens, rows, last, BLOCK_M)
        scores = bend(dot(keys, tl.trans(queries), INTERPRETED), inner, SOFTCAP)
        weights = tl.exp2(scores * outer - lses[None, :])
        if MASKED:
            query_positions = _along_columns(positions, rows, last, BLOCK_M).to(tl.int32)
            seen = visible(query_positions[None, :], key_positions[:, None], window, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        dv = add_dot(dv, weights.to(gradients.dtype), gradients, INTERPRETED)
        slopes = weights * (dot(values, tl.trans(gradients), INTERPRETED) - deltas[None, :])
        slopes = unbend(slopes, scores, SOFTCAP)
        dk = add_dot(dk, slopes.to(queries.dtype), queries, INTERPRETED)
    return dk, dv


@jit(do_not_specialize=["tokens", "part_rows", "window"])
def attention_key_gradient_kernel(
    q,
    k,
    v,
    gradient,
    lse,
    delta,
    dk,
    dv,
    dk_parts,
    dv_parts,
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
    dk_token,
    dk_head,
    tokens,
    part_rows,
    heads,
    group,
    splits,
    window,
    inner,
    outer,
    scale,
    head_size,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dk, dv (splits, T, Hkv, d) and, for shared prefixes, dk_parts, dv_parts (splits, part_rows, Hkv, d).

    splits: programs that share the `group` query heads of a key head.
    """
    units = heads // group * splits
    unit = (tl.program_id(0) % units).to(tl.int64)
    head, split = unit // splits, unit % splits
    block = blocks + tl.program_id(0) // units * 8
    first, end, shift = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    first_query, last_query, masked = tl.load(block + 3), tl.load(block + 4), tl.load(block + 5)
    slot = tl.load(block + 6)
    k, v = k + head * k_head, v + head * v_head
    keys = load_tile(k, first, k_token, end, head_size, BLOCK_N, WIDTH, True, EVEN)
    values = load_tile(v, first, v_token, end, head_size, BLOCK_N, WIDTH, True, EVEN)
    key_positions = first + shift + tl.arange(0, BLOCK_N)
    total_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    total_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    unmasked = first_query + (masked - first_query + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    share = group // splits
    query_head = head * group + split * share
    q, gradient = q + query_head * q_head, gradient + query_head * out_head
    lse, delta = lse + query_head * tokens, delta + query_head * tokens
    total_k, total_v = _sum_over_queries(
        total_k, total_v, keys, values, key_positions, q, gradient, lse, delta, positions, q_token, q_head, out_token,
        out_head, tokens, share, first_query, tl.minimum(unmasked, last_query), window, inner, outer, head_size, True,
        WINDOW, SOFTCAP, BLOCK_M, WIDTH, EVEN, INTERPRETED,
    )  # fmt: skip
    if not WINDOW:
        total_k, total_v = _sum_over_queries(
            total_k, total_v, keys, values, key_positions, q, gradient, lse, delta, positions, q_token, q_head,
            out_token, out_head, tokens, share, unmasked, last_query, window, inner, outer, head_size, False, WINDOW,
            SOFTCAP, BLOCK_M, WIDTH, EVEN, INTERPRETED,
        )  # fmt: skip
    total_k *= scale
    count = end - first
    if slot >= 0:
        place = (slot + split * part_rows) * dk_token + head * dk_head
        store_tile(dk_parts + place, total_k, 0, dk_token, count, head_size, BLOCK_N, WIDTH)
        store_tile(dv_parts + place, total_v, 0, dk_token, count, head_size, BLOCK_N, WIDTH)
    else:
        place = (first + split * tokens) * dk_token + head * dk_head
        store_tile(dk + place, total_k, 0, dk_token, count, head_size, BLOCK_N, WIDTH)
        store_tile(dv + place, total_v, 0, dk_token, count, head_size, BLOCK_N, WIDTH)
