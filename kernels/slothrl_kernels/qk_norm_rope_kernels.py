"""The kernels of `qk_norm_rope`: a program holds heads of a token, in two halves and the rest that is not turned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _row(pointer, column, end):
    """(1, columns) in float32, 0 from end on."""
    return tl.load(pointer + column, mask=column < end, other=0.0).to(tl.float32)[None, :]


@jit
def _part(pointer, head, stride, heads, column, end):
    """(HEADS, columns) in float32, 0 outside."""
    inside = (head < heads) & (column[None, :] < end)
    return tl.load(pointer + head * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
def _put(pointer, value, head, stride, heads, column, end):
    inside = (head < heads) & (column[None, :] < end)
    tl.store(pointer + head * stride + column[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@jit
def _rounded(value, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    if CAST_FIRST:
        value = value.to(dtype).to(tl.float32)
    return value


@jit
def _forward_heads(
    x, y, weight, x_head, y_head, heads, cos, sin, half, rest, eps, shift,
    CAST_FIRST: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token: x and y point at its first head, cos and sin at its angles."""
    place, beyond = tl.arange(0, HALF), tl.arange(0, max(REST, 1))
    cos_1, cos_2 = _row(cos, place, half), _row(cos + half, place, half)
    sin_1, sin_2 = _row(sin, place, half), _row(sin + half, place, half)
    weight_1, weight_2 = _row(weight, place, half) + shift, _row(weight + half, place, half) + shift
    dtype: tl.constexpr = y.dtype.element_ty
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        a = _part(x, head, x_head, heads, place, half)
        b = _part(x + half, head, x_head, heads, place, half)
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST:
            c = _part(x + 2 * half, head, x_head, heads, beyond, rest)
            square += tl.sum(c * c, 1)
        r = tl.rsqrt(square / (2 * half + rest) + eps)[:, None]
        a = _rounded(a * r, dtype, CAST_FIRST) * weight_1
        b = _rounded(b * r, dtype, CAST_FIRST) * weight_2
        _put(y, a * cos_1 - b * sin_1, head, y_head, heads, place, half)
        _put(y + half, b * cos_2 + a * sin_2, head, y_head, heads, place, half)
        if REST:
            c = _rounded(c * r, dtype, CAST_FIRST) * (_row(weight + 2 * half, beyond, rest) + shift)
            _put(y + 2 * half, c, head, y_head, heads, beyond, rest)


@jit
def qk_forward_kernel(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    cos_batch, cos_token, sin_batch, sin_token, length, q_heads, k_heads, half, rest, eps, shift,
    CAST_FIRST: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // length).to(tl.int64)  # 64 bits: batch * stride may pass 2**31
    token = (tl.program_id(0) % length).to(tl.int64)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    _forward_heads(
        q + batch * q_batch + token * q_token, q_out + batch * q_out_batch + token * q_out_token, q_weight,
        q_head, q_out_head, q_heads, cos, sin, half, rest, eps, shift, CAST_FIRST, HEADS, HALF, REST,
    )  # fmt: skip
    _forward_heads(
        k + batch * k_batch + token * k_token, k_out + batch * k_out_batch + token * k_out_token, k_weight,
        k_head, k_out_head, k_heads, cos, sin, half, rest, eps, shift, CAST_FIRST, HEADS, HALF, REST,
    )  # fmt: skip


@jit
def _backward_heads(
    to_y, x, to_x, weight, to_y_head, x_head, to_x_head, heads, cos, sin, half, rest, eps, shift,
    to_weight_1, to_weight_2, to_weight_3,
    CAST_FIRST: tl.constexpr, WANTS_WEIGHT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token; adds to the weight's gradient, head by head, in the three parts of a head."""
    place, beyond = tl.arange(0, HALF), tl.arange(0, max(REST, 1))
    cos_1, cos_2 = _row(cos, place, half), _row(cos + half, place, half)
    sin_1, sin_2 = _row(sin, place, half), _row(sin + half, place, half)
    weight_1, weight_2 = _row(weight, place, half) + shift, _row(weight + half, place, half) + shift
    dtype: tl.constexpr = x.dtype.element_ty
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        a = _part(x, head, x_head, heads, place, half)
        b = _part(x + half, head, x_head, heads, place, half)
        to_a = _part(to_y, head, to_y_head, heads, place, half)
        to_b = _part(to_y + half, head, to_y_head, heads, place, half)
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST:
            c = _part(x + 2 * half, head, x_head, heads, beyond, rest)
            to_c = _part(to_y + 2 * half, head, to_y_head, heads, beyond, rest)
            square += tl.sum(c * c, 1)
        r = tl.rsqrt(square / (2 * half + rest) + eps)[:, None]
        to_a, to_b = to_a * cos_1 + to_b * sin_2, to_b * cos_2 - to_a * sin_1  # the gradient before the rotation
        a, b = a * r, b * r
        if WANTS_WEIGHT:
            to_weight_1 += to_a * _rounded(a, dtype, CAST_FIRST)
            to_weight_2 += to_b * _rounded(b, dtype, CAST_FIRST)
        to_a *= weight_1
        to_b *= weight_2
        along = tl.sum(to_a * a, 1) + tl.sum(to_b * b, 1)
        if REST:
            c = c * r
            if WANTS_WEIGHT:
                to_weight_3 += to_c * _rounded(c, dtype, CAST_FIRST)
            to_c = to_c * (_row(weight + 2 * half, beyond, rest) + shift)
            along += tl.sum(to_c * c, 1)
        along = (along / (2 * half + rest))[:, None]
        _put(to_x, r * (to_a - a * along), head, to_x_head, heads, place, half)
        _put(to_x + half, r * (to_b - b * along), head, to_x_head, heads, place, half)
        if REST:
            _put(to_x + 2 * half, r * (to_c - c * along), head, to_x_head, heads, beyond, rest)
    return to_weight_1, to_weight_2, to_weight_3


@jit
def _put_weight(partials, first, second, third, half, rest, HALF: tl.constexpr, REST: tl.constexpr):
    place = tl.arange(0, HALF)
    tl.store(partials + place, tl.sum(first, 0), mask=place < half)
    tl.store(partials + half + place, tl.sum(second, 0), mask=place < half)
    if REST:
        beyond = tl.arange(0, REST)
        tl.store(partials + 2 * half + beyond, tl.sum(third, 0), mask=beyond < rest)


@jit
def qk_backward_kernel(
    to_q_out, to_k_out, q, k, to_q, to_k, q_weight, k_weight, cos, sin, partials,
    to_q_out_batch, to_q_out_head, to_q_out_token, to_k_out_batch, to_k_out_head, to_k_out_token,
    q_batch, q_head, q_token, k_batch, k_head, k_token, to_q_batch, to_q_head, to_q_token,
    to_k_batch, to_k_head, to_k_token, cos_batch, cos_token, sin_batch, sin_token,
    count, length, turns, q_heads, k_heads, half, rest, eps, shift,
    CAST_FIRST: tl.constexpr, WANTS_WEIGHT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """`turns` tokens a program, of `count`; partials (2, programs, width): a sum over them for q's weight and k's."""
    # Summed over heads only at the end: a sum over them would go through shared memory with every token.
    q_1, q_2 = tl.zeros([HEADS, HALF], tl.float32), tl.zeros([HEADS, HALF], tl.float32)
    k_1, k_2 = tl.zeros([HEADS, HALF], tl.float32), tl.zeros([HEADS, HALF], tl.float32)
    q_3, k_3 = tl.zeros([HEADS, max(REST, 1)], tl.float32), tl.zeros([HEADS, max(REST, 1)], tl.float32)
    first = tl.program_id(0) * turns
    for place in range(first, tl.minimum(first + turns, count)):
        batch, token = (place // length).to(tl.int64), (place % length).to(tl.int64)
        angle_cos = cos + batch * cos_batch + token * cos_token
        angle_sin = sin + batch * sin_batch + token * sin_token
        q_1, q_2, q_3 = _backward_heads(
            to_q_out + batch * to_q_out_batch + token * to_q_out_token, q + batch * q_batch + token * q_token,
            to_q + batch * to_q_batch + token * to_q_token, q_weight, to_q_out_head, q_head, to_q_head, q_heads,
            angle_cos, angle_sin, half, rest, eps, shift, q_1, q_2, q_3, CAST_FIRST, WANTS_WEIGHT, HEADS, HALF, REST,
        )  # fmt: skip
        k_1, k_2, k_3 = _backward_heads(
            to_k_out + batch * to_k_out_batch + token * to_k_out_token, k + batch * k_batch + token * k_token,
            to_k + batch * to_k_batch + token * to_k_token, k_weight, to_k_out_head, k_head, to_k_head, k_heads,
            angle_cos, angle_sin, half, rest, eps, shift, k_1, k_2, k_3, CAST_FIRST, WANTS_WEIGHT, HEADS, HALF, REST,
        )  # fmt: skip
    if WANTS_WEIGHT:
        width = 2 * half + rest
        partials += tl.program_id(0) * width
        _put_weight(partials, q_1, q_2, q_3, half, rest, HALF, REST)
        _put_weight(partials + tl.num_programs(0) * width, k_1, k_2, k_3, half, rest, HALF, REST)
