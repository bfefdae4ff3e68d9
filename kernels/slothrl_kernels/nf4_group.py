"""Several nf4 weights into one buffer, with what LoRA puts beside them, in one launch.

    [W_i | B_i at its own columns, else zeros], one below the other: (N, K + R); also of some rows, or columns, of each

Projections of one input are multiplied as one matrix. Unpacked one by one, q, k and v take three launches, and their B
four more for a few columns; the host is slower at that than the GPU is at the work. The weights have the same bits as
from `nf4_dequantize`, whose code this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slothrl_kernels.base_weight import BaseWeight, dense
from slothrl_kernels.nf4_dequantize import DEFAULT_LAUNCH, by_words
from slothrl_kernels.nf4_group_kernels import unpack_group_kernel
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import HAS_TRITON, Impl, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton

ROWS = 64  # of B that a program writes
MOST = 3  # weights of a launch, as `unpack_group_kernel` has it


class Part(NamedTuple):
    """What becomes some rows of the buffer: rows of one weight, and what goes beside them.

    weight: (N, K). b: (rows, r) contiguous, of the buffer's dtype, or None: zeros. start: in which of the columns after
    W's it begins. rows: which rows of the weight, by step 1; None: all.
    """

    weight: BaseWeight
    b: Tensor | None = None
    start: int = 0
    rows: slice | None = None

    @property
    def first(self) -> int:
        return self.rows.start if self.rows else 0

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start if self.rows else self.weight.shape[0]


def unpack_group_reference(parts: Sequence[Part], out: Tensor, columns: slice | None = None) -> Tensor:
    """The plain-torch truth of `unpack_group`, with the same arguments; float64 too."""
    return _one_by_one(parts, out, columns or slice(0, parts[0].weight.shape[1]), "torch")


def unpack_group(parts: Sequence[Part], out: Tensor, columns: slice | None = None, impl: Impl = "auto") -> Tensor:
    """Every part below the one before it; in one launch where all weights are nf4 of one kind, three at most.

    Args:
        parts: of weights with the same number of inputs.
        out: (sum of the parts' rows, width + R), bfloat16, float16, float32, or float64 (never a kernel); contiguous,
            all of it is written.
        columns: which of the weights' columns, by step 1; None: all.
        impl: as of `nf4_dequantize`.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    columns = columns or slice(0, parts[0].weight.shape[1])
    _check(parts, out, columns)
    if out.dtype == torch.float64 or not takes_triton(impl, out) or not _alike(parts, columns):
        return _one_by_one(parts, out, columns, impl)
    _run(parts, out, columns)
    return out


def _check(parts: Sequence[Part], out: Tensor, columns: slice) -> None:
    inputs, width = parts[0].weight.shape[1], columns.stop - columns.start
    rows, right = sum(p.count for p in parts), out.shape[1] - width
    if any(p.weight.shape[1] != inputs or p.first + p.count > p.weight.shape[0] for p in parts) or right < 0:
        raise ValueError(f"parts of {[tuple(p.weight.shape) for p in parts]} do not fit into {tuple(out.shape)}")
    if out.shape[0] != rows or columns.start < 0 or columns.stop > inputs or not out.is_contiguous():
        raise ValueError(f"{rows} rows, columns {columns} of {inputs} do not fit into {tuple(out.shape)}, contiguous")
    for p in parts:
        if p.b is not None and (p.b.shape[0] != p.count or p.start + p.b.shape[1] > right or p.b.dtype != out.dtype):
            raise ValueError(f"{tuple(p.b.shape)} {p.b.dtype} does not fit beside {p.count} rows, {right} columns")


def _alike(parts: Sequence[Part], columns: slice) -> bool:
    """Whether one launch serves all: nf4 of one block size, nested alike, whole words, rows of whole words."""
    nf4 = [p.weight for p in parts if isinstance(p.weight, Nf4Weight)]
    kinds = {(w.blocksize, w.nested.blocksize if w.nested else 0) for w in nf4}
    whole = all(n % 8 == 0 for n in (nf4[0].shape[1], columns.start, columns.stop)) if nf4 else False
    return len(parts) == len(nf4) <= MOST and len(kinds) == 1 and whole and all(by_words(w) for w in nf4)


def _one_by_one(parts: Sequence[Part], out: Tensor, columns: slice, impl: Impl) -> Tensor:
    inputs, width, end = parts[0].weight.shape[1], columns.stop - columns.start, 0
    if any(p.b is None or p.b.shape[1] < out.shape[1] - width for p in parts):
        out[:, width:].zero_()
    for p in parts:
        rows = out[end : end + p.count]
        if (p.count, width) == (p.weight.shape[0], inputs):
            dense(p.weight, out.dtype, rows[:, :width], impl)
        else:
            rows[:, :width] = dense(p.weight, out.dtype, None, impl)[p.first : p.first + p.count, columns]
        if p.b is not None:
            rows[:, width + p.start : width + p.start + p.b.shape[1]] = p.b
        end += p.count
    return out


def _run(parts: Sequence[Part], out: Tensor, columns: slice) -> None:
    width, launch = columns.stop - columns.start, DEFAULT_LAUNCH
    right, weights = out.shape[1] - width, [p.weight for p in parts if isinstance(p.weight, Nf4Weight)]
    pointers, sizes, programs, begin = [], [], [], 0
    for p, w in zip(parts, weights, strict=True):
        nested = w.nested
        inner = (nested.code, nested.absmax, nested.offset) if nested else (w.code, w.code, w.code)
        pointers.append((w.packed.view(-1).view(torch.int32), w.absmax, w.code, *inner, out if p.b is None else p.b))
        words = triton.cdiv(p.count * width, 8 * launch.words * launch.repeat)
        sizes.append((begin, p.count, p.first, words, p.start, 0 if p.b is None else p.b.shape[1]))
        programs.append(words + (triton.cdiv(p.count, ROWS) if right else 0))
        begin += p.count
    missing = MOST - len(parts)
    ends = list(accumulate(programs)) + [sum(programs)] * missing  # no program comes to those that are not there
    with torch.cuda.device_of(out):
        unpack_group_kernel[(ends[-1],)](
            *(p for group in pointers + pointers[:1] * missing for p in group),
            *(n for group in sizes + sizes[:1] * missing for n in group),
            ends[0],
            ends[1],
            out,
            width,
            right,
            weights[0].shape[1],
            columns.start,
            BLOCKSIZE=weights[0].blocksize,
            INNER_BLOCKSIZE=weights[0].nested.blocksize if weights[0].nested else 0,
            WORDS=launch.words,
            REPEAT=launch.repeat,
            ROWS=ROWS,
            RIGHT=triton.next_power_of_2(right) if right else 0,
            num_warps=launch.warps,
            enable_fp_fusion=False,
        )
