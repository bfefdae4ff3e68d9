"""The kernel of `rope`: a program turns all heads of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _turn_heads(
    x,
    y,
    x_stride,
    y_stride,
    heads,
    first_cos,
    first_sin,
    second_cos,
    second_sin,
    half,
    rest,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """All heads of one token: x and y point at its first head."""
    place = tl.arange(0, HALF)
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < heads) & (place[None, :] < half)
        source = x + head * x_stride + place[None, :]
        a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            c = a * first_cos + b * second_sin
            d = b * second_cos - a * first_sin
        else:
            c = a * first_cos - b * first_sin
            d = b * second_cos + a * second_sin
        target = y + head * y_stride + place[None, :]
        tl.store(target, c.to(y.dtype.element_ty), mask=inside)
        tl.store(target + half, d.to(y.dtype.element_ty), mask=inside)
        if rest > 0:
            place_rest = tl.arange(0, REST)[None, :]
            inside_rest = (head < heads) & (place_rest < rest)
            kept = tl.load(x + head * x_stride + 2 * half + place_rest, mask=inside_rest, other=0.0)
            tl.store(y + head * y_stride + 2 * half + place_rest, kept, mask=inside_rest)


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
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
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
    _turn_heads(
        q,
        q_out,
        q_head,
        q_out_head,
        q_heads,
        first_cos,
        first_sin,
        second_cos,
        second_sin,
        half,
        rest,
        BACKWARD,
        HEADS,
        HALF,
        REST,
    )
    k += batch * k_batch + token * k_token
    k_out += batch * k_out_batch + token * k_out_token
    _turn_heads(
        k,
        k_out,
        k_head,
        k_out_head,
        k_heads,
        first_cos,
        first_sin,
        second_cos,
        second_sin,
        half,
        rest,
        BACKWARD,
        HEADS,
        HALF,
        REST,
    )
