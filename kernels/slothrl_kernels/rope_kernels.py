"""The kernel of `rope`: a program turns all heads of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _pairs(x, x_stride, start, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Both halves of some heads of one token, in float32; x points at its first head."""
    head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    place = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (place < half)
    source = x + head * x_stride + place
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(source + half, mask=inside, other=0.0).to(tl.float32)


@jit
def _put(
    y,
    y_stride,
    start,
    heads,
    half,
    a,
    b,
    first_cos,
    first_sin,
    second_cos,
    second_sin,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The same pairs turned, to where y has them."""
    head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    place = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (place < half)
    if BACKWARD:
        c = a * first_cos + b * second_sin
        d = b * second_cos - a * first_sin
    else:
        c = a * first_cos - b * first_sin
        d = b * second_cos + a * second_sin
    target = y + head * y_stride + place
    tl.store(target, c.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half, d.to(y.dtype.element_ty), mask=inside)


@jit
def _put_rest(x, y, x_stride, y_stride, heads, begin, rest, HEADS: tl.constexpr, REST: tl.constexpr):
    """What is not turned, of all heads of one token."""
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        place = tl.arange(0, REST)[None, :]
        inside = (head < heads) & (place < rest)
        kept = tl.load(x + head * x_stride + begin + place, mask=inside, other=0.0)
        tl.store(y + head * y_stride + begin + place, kept, mask=inside)


@jit
def rope_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    length,
    q_heads,
    k_heads,
    half,
    rest,
    BACKWARD: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """The first Q_HEADS and K_HEADS are asked for before anything is stored: a load behind a store waits for it."""
    batch = (tl.program_id(0) // length).to(tl.int64)  # 64 bits: batch * stride may pass 2**31
    token = (tl.program_id(0) % length).to(tl.int64)
    place = tl.arange(0, HALF)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    first_cos = tl.load(cos + place, mask=place < half, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin + place, mask=place < half, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + half + place, mask=place < half, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin + half + place, mask=place < half, other=0.0).to(tl.float32)[None, :]
    q += batch * q_batch + token * q_token
    q_out += batch * q_out_batch + token * q_out_token
    k += batch * k_batch + token * k_token
    k_out += batch * k_out_batch + token * k_out_token
    a, b = _pairs(q, q_head, 0, q_heads, half, Q_HEADS, HALF)
    c, d = _pairs(k, k_head, 0, k_heads, half, K_HEADS, HALF)
    turns = (first_cos, first_sin, second_cos, second_sin)
    _put(q_out, q_out_head, 0, q_heads, half, a, b, *turns, BACKWARD, Q_HEADS, HALF)
    _put(k_out, k_out_head, 0, k_heads, half, c, d, *turns, BACKWARD, K_HEADS, HALF)
    for start in range(Q_HEADS, q_heads, Q_HEADS):
        a, b = _pairs(q, q_head, start, q_heads, half, Q_HEADS, HALF)
        _put(q_out, q_out_head, start, q_heads, half, a, b, *turns, BACKWARD, Q_HEADS, HALF)
    for start in range(K_HEADS, k_heads, K_HEADS):
        c, d = _pairs(k, k_head, start, k_heads, half, K_HEADS, HALF)
        _put(k_out, k_out_head, start, k_heads, half, c, d, *turns, BACKWARD, K_HEADS, HALF)
    if rest > 0:
        _put_rest(q, q_out, q_head, q_out_head, q_heads, 2 * half, rest, Q_HEADS, REST)
        _put_rest(k, k_out, k_head, k_out_head, k_heads, 2 * half, rest, K_HEADS, REST)
