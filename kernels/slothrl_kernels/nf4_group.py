"""Several nf4 weights into one buffer, with what LoRA puts beside them, in one launch.

    [W_i | B_i at its own columns, else zeros], one below the other: (N, K + R)

Projections of one input are multiplied as one matrix. Unpacked one by one, q, k and v take three launches, and their B
four more for a few columns; the host is slower at that than the GPU is at the work. The weights have the same bits as
from `nf4_dequantize`, whose code this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.base_weight import BaseWeight, dense
from slothrl_kernels.nf4_dequantize import DEFAULT_LAUNCH, by_words, unpack_words
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import HAS_TRITON, Impl, jit, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

ROWS = 64  # of B that a program writes
MOST = 3  # weights of a launch


def unpack_group_reference(
    weights: Sequence[BaseWeight], beside: Sequence[Tensor | None], starts: Sequence[int], out: Tensor
) -> Tensor:
    """The plain-torch truth of `unpack_group`, with the same arguments; any weights, float64 too."""
    return _one_by_one(weights, beside, starts, out, "torch")


def unpack_group(
    weights: Sequence[BaseWeight],
    beside: Sequence[Tensor | None],
    starts: Sequence[int],
    out: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Every W_i below the one before it, and beside it B_i; in one launch where all are nf4 of one kind, at most three.

    Args:
        weights: (N_i, K) each.
        beside: (N_i, r_i) contiguous, of out's dtype, or None: zeros.
        starts: in which of the columns after K each begins.
        out: (sum of N_i, K + R), bfloat16, float16, float32, or float64 (never a kernel); contiguous, all written.
        impl: as of `nf4_dequantize`.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    _check(weights, beside, starts, out)
    nf4 = [w for w in weights if isinstance(w, Nf4Weight)]
    if len(nf4) < len(weights) or len(nf4) > MOST or not _alike(nf4) or out.dtype == torch.float64:
        return _one_by_one(weights, beside, starts, out, impl)
    if not takes_triton(impl, out):
        return _one_by_one(weights, beside, starts, out, impl)
    _run(nf4, beside, starts, out)
    return out


def _check(weights: Sequence[BaseWeight], beside: Sequence[Tensor | None], starts: Sequence[int], out: Tensor) -> None:
    inputs, rows = weights[0].shape[1], sum(w.shape[0] for w in weights)
    if any(w.shape[1] != inputs for w in weights) or out.shape[0] != rows or out.shape[1] < inputs:
        raise ValueError(f"weights {[tuple(w.shape) for w in weights]} do not fit into {tuple(out.shape)}")
    right = out.shape[1] - inputs
    for w, b, start in zip(weights, beside, starts, strict=True):
        if b is not None and (b.shape[0] != w.shape[0] or start + b.shape[1] > right or b.dtype != out.dtype):
            raise ValueError(f"{tuple(b.shape)} {b.dtype} does not fit beside {tuple(w.shape)}, {right} columns")
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")


def _alike(weights: Sequence[Nf4Weight]) -> bool:
    """Whether one launch serves all: one block size, nested alike, whole words, rows of whole words."""
    kinds = {(w.blocksize, w.nested.blocksize if w.nested else 0) for w in weights}
    return len(kinds) == 1 and weights[0].shape[1] % 8 == 0 and all(by_words(w) for w in weights)


def _one_by_one(
    weights: Sequence[BaseWeight], beside: Sequence[Tensor | None], starts: Sequence[int], out: Tensor, impl: Impl
) -> Tensor:
    inputs, end = weights[0].shape[1], 0
    if sum(b.shape[1] for b in beside if b is not None) < (out.shape[1] - inputs) * len(weights):
        out[:, inputs:].zero_()
    for w, b, start in zip(weights, beside, starts, strict=True):
        rows = out[end : end + w.shape[0]]
        dense(w, out.dtype, rows[:, :inputs], impl)
        if b is not None:
            rows[:, inputs + start : inputs + start + b.shape[1]] = b
        end += w.shape[0]
    return out


def _run(weights: list[Nf4Weight], beside: Sequence[Tensor | None], starts: Sequence[int], out: Tensor) -> None:
    columns, right, launch = weights[0].shape[1], out.shape[1] - weights[0].shape[1], DEFAULT_LAUNCH
    pointers, sizes, programs = [], [], []
    begins = [0, *accumulate(w.shape[0] for w in weights)]
    for w, b, start, begin in zip(weights, beside, starts, begins, strict=False):
        nested, rows = w.nested, w.shape[0]
        inner = (nested.code, nested.absmax, nested.offset) if nested else (w.code, w.code, w.code)
        pointers.append((w.packed.view(-1).view(torch.int32), w.absmax, w.code, *inner, out if b is None else b))
        words = triton.cdiv(rows * columns, 8 * launch.words * launch.repeat)
        sizes.append((begin, rows, words, start, 0 if b is None else b.shape[1]))
        programs.append(words + (triton.cdiv(rows, ROWS) if right else 0))
    missing = MOST - len(weights)
    ends = list(accumulate(programs)) + [sum(programs)] * missing  # no program comes to those that are not there
    with torch.cuda.device_of(out):
        unpack_group_kernel[(ends[-1],)](
            *(p for group in pointers + pointers[:1] * missing for p in group),
            *(n for group in sizes + sizes[:1] * missing for n in group),
            ends[0],
            ends[1],
            out,
            columns,
            right,
            BLOCKSIZE=weights[0].blocksize,
            INNER_BLOCKSIZE=weights[0].nested.blocksize if weights[0].nested else 0,
            WORDS=launch.words,
            REPEAT=launch.repeat,
            ROWS=ROWS,
            RIGHT=triton.next_power_of_2(right) if right else 0,
            num_warps=launch.warps,
            enable_fp_fusion=False,
        )


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
    words,
    start,
    rank,
    out,
    columns,
    right,
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
        unpack_words(
            first, packed, scales, here, count, columns, stride, BLOCKSIZE, INNER_BLOCKSIZE, True, True, WORDS, REPEAT
        )
    if RIGHT > 0:  # noqa: SIM102 - known to the compiler, the other is not
        if program >= words:
            row = (program - words).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            column = tl.arange(0, RIGHT)[None, :]
            own = (row < rows) & (column >= start) & (column < start + rank)
            value = tl.load(b + row * rank + (column - start), mask=own, other=0.0)
            tl.store(here + row * stride + columns + column, value, mask=(row < rows) & (column < right))


# Compiled once for all models: of these numbers nothing depends.
_PLAIN = [f"{name}_{i}" for name in ("begin", "rows", "words", "start", "rank") for i in range(MOST)] + [
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
    words_0,
    start_0,
    rank_0,
    begin_1,
    rows_1,
    words_1,
    start_1,
    rank_1,
    begin_2,
    rows_2,
    words_2,
    start_2,
    rank_2,
    end_0,
    end_1,
    out,
    columns,
    right,
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
            words_0,
            start_0,
            rank_0,
            out,
            columns,
            right,
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
            words_1,
            start_1,
            rank_1,
            out,
            columns,
            right,
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
            words_2,
            start_2,
            rank_2,
            out,
            columns,
            right,
            BLOCKSIZE,
            INNER_BLOCKSIZE,
            WORDS,
            REPEAT,
            ROWS,
            RIGHT,
        )
