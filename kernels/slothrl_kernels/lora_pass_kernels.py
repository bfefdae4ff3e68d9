"""The kernels of `lora_pass`: dy is read once, in strips of columns; the sums of what they leave are one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def strips_kernel(
    to_y,
    xa,
    b,
    through_b,
    to_b,
    tokens,
    outputs,
    rank,
    to_y_stride,
    xa_stride,
    first_end,
    second_end,
    turns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """A program takes COLUMNS of dy, all of one projection's, and turns x ROWS tokens.

    through_b (strips, M, RANK) float32: dy B of these columns alone. to_b (programs along M, N, RANK) float32: dB of
    these tokens alone.
    """
    strip, part = tl.program_id(0), tl.program_id(1)
    start = strip * COLUMNS
    place = (start >= first_end).to(tl.int32) + (start >= second_end).to(tl.int32)  # which projection's
    column, r = start + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    held = tl.load(b + column[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0.0)
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for turn in range(turns):
        row = (part * turns + turn) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # 64 bits: tokens * stride may pass 2**31
        inside = (row < tokens)[:, None]
        gradient = tl.load(to_y + row[:, None] * to_y_stride + column[None, :], mask=inside, other=0.0)
        small = tl.load(
            xa + row[:, None] * xa_stride + place * rank + r[None, :], mask=inside & (r < rank)[None, :], other=0.0
        )
        found = tl.dot(gradient, held, input_precision="ieee")
        tl.store(through_b + (strip * tokens.to(tl.int64) + row[:, None]) * RANK + r[None, :], found, mask=inside)
        total = tl.dot(tl.trans(gradient), small, total, input_precision="ieee")
    tl.store(to_b + (part * outputs.to(tl.int64) + column[:, None]) * RANK + r[None, :], total)


@jit
def sums_kernel(
    through_b,
    to_b,
    to_xa,
    found_b,
    tokens,
    outputs,
    rank,
    to_xa_stride,
    first_strips,
    second_strips,
    strips,
    parts,
    row_programs,
    projections,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
):
    """The first projections x row_programs programs sum strips into dy B (M, R), the others parts into dB (N, r)."""
    program, r = tl.program_id(0), tl.arange(0, RANK)
    total = tl.zeros([ROWS, RANK], tl.float32)
    if program < projections * row_programs:
        place = program // row_programs
        begin = tl.where(place == 0, 0, tl.where(place == 1, first_strips, second_strips))
        end = tl.where(place == projections - 1, strips, tl.where(place == 0, first_strips, second_strips))
        row = (program % row_programs) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < tokens)[:, None]
        for strip in range(begin, end):
            total += tl.load(
                through_b + (strip * tokens.to(tl.int64) + row[:, None]) * RANK + r[None, :], mask=inside, other=0.0
            )
        target = to_xa + row[:, None] * to_xa_stride + place * rank + r[None, :]
        tl.store(target, total.to(to_xa.dtype.element_ty), mask=inside & (r < rank)[None, :])
    else:
        row = (program - projections * row_programs) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < outputs)[:, None]
        for part in range(parts):
            total += tl.load(
                to_b + (part * outputs.to(tl.int64) + row[:, None]) * RANK + r[None, :], mask=inside, other=0.0
            )
        target = found_b + row[:, None] * rank + r[None, :]
        tl.store(target, total.to(found_b.dtype.element_ty), mask=inside & (r < rank)[None, :])
