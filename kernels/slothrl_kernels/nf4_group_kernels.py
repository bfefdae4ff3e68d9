"""The kernel of `unpack_group`: up to three nf4 weights unpacked below each other, with what stands beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slothrl_kernels.nf4_dequantize import unpack_words
from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _part(
    program,
    packed,
    absmax,
    code,
    inner_code,
    inner_absmax,
    offset,
    b,
    begin,
    rows,
    first_row,
    words,
    start,
    rank,
    out,
    columns,
    right,
    width,
    first_column,
    BLOCKSIZE: tl.constexpr,
    INNER_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """One program of one weight: the first `words` unpack it, the others write what is beside it."""
    stride = columns + right
    here = out + begin.to(tl.int64) * stride
    if program < words:
        first = program.to(tl.int64) * (WORDS * REPEAT)
        count = rows.to(tl.int64) * columns
        scales = (absmax, code, inner_code, inner_absmax, offset)
        source = (first_row, width, first_column, (rows.to(tl.int64) + first_row) * width)
        unpack_words(
            first,
            packed,
            scales,
            here,
            count,
            columns,
            stride,
            source,
            BLOCKSIZE,
            INNER_BLOCKSIZE,
            True,
            True,
            True,
            WORDS,
            REPEAT,
        )
    if RIGHT > 0:  # noqa: SIM102 - known to the compiler, the other is not
        if program >= words:
            row = (program - words).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            column = tl.arange(0, RIGHT)[None, :]
            own = (row < rows) & (column >= start) & (column < start + rank)
            value = tl.load(b + row * rank + (column - start), mask=own, other=0.0)
            tl.store(here + row * stride + columns + column, value, mask=(row < rows) & (column < right))


# Compiled once for all models: of these numbers nothing depends.
_PLAIN = [f"{name}_{i}" for name in ("begin", "rows", "first_row", "words", "start", "rank") for i in range(3)] + [
    "end_0",
    "end_1",
]


@jit(do_not_specialize=_PLAIN)
def unpack_group_kernel(
    packed_0,
    absmax_0,
    code_0,
    inner_code_0,
    inner_absmax_0,
    offset_0,
    b_0,
    packed_1,
    absmax_1,
    code_1,
    inner_code_1,
    inner_absmax_1,
    offset_1,
    b_1,
    packed_2,
    absmax_2,
    code_2,
    inner_code_2,
    inner_absmax_2,
    offset_2,
    b_2,
    begin_0,
    rows_0,
    first_row_0,
    words_0,
    start_0,
    rank_0,
    begin_1,
    rows_1,
    first_row_1,
    words_1,
    start_1,
    rank_1,
    begin_2,
    rows_2,
    first_row_2,
    words_2,
    start_2,
    rank_2,
    end_0,
    end_1,
    out,
    columns,
    right,
    width,
    first_column,
    BLOCKSIZE: tl.constexpr,
    INNER_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    RIGHT: tl.constexpr,
):
    program = tl.program_id(0)
    if program < end_0:
        _part(
            program,
            packed_0,
            absmax_0,
            code_0,
            inner_code_0,
            inner_absmax_0,
            offset_0,
            b_0,
            begin_0,
            rows_0,
            first_row_0,
            words_0,
            start_0,
            rank_0,
            out,
            columns,
            right,
            width,
            first_column,
            BLOCKSIZE,
            INNER_BLOCKSIZE,
            WORDS,
            REPEAT,
            ROWS,
            RIGHT,
        )
    elif program < end_1:
        _part(
            program - end_0,
            packed_1,
            absmax_1,
            code_1,
            inner_code_1,
            inner_absmax_1,
            offset_1,
            b_1,
            begin_1,
            rows_1,
            first_row_1,
            words_1,
            start_1,
            rank_1,
            out,
            columns,
            right,
            width,
            first_column,
            BLOCKSIZE,
            INNER_BLOCKSIZE,
            WORDS,
            REPEAT,
            ROWS,
            RIGHT,
        )
    else:
        _part(
            program - end_1,
            packed_2,
            absmax_2,
            code_2,
            inner_code_2,
            inner_absmax_2,
            offset_2,
            b_2,
            begin_2,
            rows_2,
            first_row_2,
            words_2,
            start_2,
            rank_2,
            out,
            columns,
            right,
            width,
            first_column,
            BLOCKSIZE,
            INNER_BLOCKSIZE,
            WORDS,
            REPEAT,
            ROWS,
            RIGHT,
        )
