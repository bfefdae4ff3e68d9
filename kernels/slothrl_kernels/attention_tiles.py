"""What the attention kernels share: loading tiles, scores with a softcap, which key a query sees.

With s a score, exp(s) is exp2(x outer), one fused multiply-add and one exp2. Without a softcap x = q k^T and outer =
scale log2(e); with a softcap c, x = tanh((q k^T) inner), inner = scale / c and outer = c log2(e). outer is positive, so
that the largest x gives the largest score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def load_tile(
    pointer,
    start,
    stride,
    end,
    head_size,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    BOUNDED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Tokens start.. of one head as (COUNT, WIDTH); zeros from token `end` on if BOUNDED, and from head_size on."""
    row, column = tl.arange(0, COUNT)[:, None], tl.arange(0, WIDTH)[None, :]
    # The start in 64 bits: tokens * stride may pass 2**31; inside a tile it cannot.
    address = pointer + start * stride.to(tl.int64) + row * stride + column
    if BOUNDED and EVEN:
        return tl.load(address, mask=start + row < end, other=0.0)
    if BOUNDED:
        return tl.load(address, mask=(start + row < end) & (column < head_size), other=0.0)
    if EVEN:
        return tl.load(address)
    return tl.load(address, mask=column < head_size, other=0.0)


@jit
def store_tile(pointer, tile, start, stride, end, head_size, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_tile`, bounded on both sides, rounded to what the pointer holds."""
    row, column = tl.arange(0, COUNT)[:, None], tl.arange(0, WIDTH)[None, :]
    address = pointer + start * stride.to(tl.int64) + row * stride + column
    tl.store(address, tile.to(pointer.dtype.element_ty), mask=(start + row < end) & (column < head_size))


@jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """a @ b in float32; never through TF32, and in the interpreter, which multiplies no bfloat16, never in 16 bits."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def add_dot(total, a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def bend(dots, inner, SOFTCAP: tl.constexpr):
    """q k^T -> x."""
    if SOFTCAP:
        small = tl.exp2(tl.abs(dots * inner) * -2.8853900817779268)  # exp(-2 |dots inner|): no overflow
        bent = (1.0 - small) / (1.0 + small)
        dots = tl.where(dots < 0, -bent, bent)
    return dots


@jit
def unbend(slopes, bent, SOFTCAP: tl.constexpr):
    """d loss / d s -> d loss / d (scale q k^T): tanh' = 1 - tanh^2."""
    if SOFTCAP:
        slopes = slopes * (1.0 - bent * bent)
    return slopes


@jit
def visible(query_positions, key_positions, window, WINDOW: tl.constexpr):
    """Causal and within the window. A parent's positions lie before all of its children's: one rule serves both."""
    if WINDOW:
        return (key_positions <= query_positions) & (key_positions > query_positions - window)
    return key_positions <= query_positions
