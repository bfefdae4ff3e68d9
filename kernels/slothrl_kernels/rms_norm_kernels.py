"""The kernels of `rms_norm`: a program holds whole rows in registers and reads each element once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _weight(weight, column, width, shift, HAS_WEIGHT: tl.constexpr):
    """weight + shift in float32, (1, columns)."""
    if HAS_WEIGHT:
        return (tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + shift)[None, :]
    return tl.full([1, column.shape[0]], 1.0, tl.float32)


@jit
def forward_kernel(
    x,
    residual,
    weight,
    y,
    total,
    scale,
    count,
    width,
    x_stride,
    residual_stride,
    y_stride,
    total_stride,
    eps,
    shift,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: count * width may pass 2**31
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < count) & (column[None, :] < width)
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row[:, None] * total_stride + column[None, :], rounded, mask=inside)
        value = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(scale + row, r, mask=row < count)
    normed = value * r[:, None]
    if CAST_FIRST:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    normed *= _weight(weight, column, width, shift, HAS_WEIGHT)
    tl.store(y + row[:, None] * y_stride + column[None, :], normed.to(y.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    to_y,
    to_sum,
    total,
    weight,
    scale,
    to_x,
    partials,
    count,
    width,
    to_y_stride,
    to_sum_stride,
    total_stride,
    to_x_stride,
    shift,
    turns,
    HAS_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    factor = _weight(weight, column, width, shift, HAS_WEIGHT)
    # Summed over rows only at the end: a sum over them goes through shared memory.
    to_weight = tl.zeros([ROWS, COLUMNS] if WANTS_WEIGHT else [1, 1], tl.float32)
    for turn in range(turns):
        row = (tl.program_id(0).to(tl.int64) * turns + turn) * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < count) & (column[None, :] < width)
        r = tl.load(scale + row, mask=row < count, other=0.0)[:, None]
        value = tl.load(total + row[:, None] * total_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(to_y + row[:, None] * to_y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        normed = value * r
        weighted = gradient * factor
        result = r * (weighted - normed * (tl.sum(weighted * normed, 1) / width)[:, None])
        if HAS_SUM:
            result += tl.load(to_sum + row[:, None] * to_sum_stride + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(to_x + row[:, None] * to_x_stride + column[None, :], result.to(to_x.dtype.element_ty), mask=inside)
        if WANTS_WEIGHT:
            if CAST_FIRST:
                normed = normed.to(total.dtype.element_ty).to(tl.float32)
            to_weight += gradient * normed
    if WANTS_WEIGHT:
        tl.store(partials + tl.program_id(0) * width + column, tl.sum(to_weight, 0), mask=column < width)
