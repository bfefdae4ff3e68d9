"""Dequantisation of nf4 weights, bit-equal to bitsandbytes' dequantize_4bit.

The product code * absmax is taken in float32 and rounded once to the output's dtype; a nested absmax is expanded with
two roundings and no fused multiply-add, as bitsandbytes does it in two kernels.

One thread of the kernel takes one 32-bit word: 8 weights, hence one 16-byte store that lies beside its neighbour's.
The 16 codes are read from memory: they fill half a cache line, and a warp's look-ups in one line are one transaction.
Some 6 instructions a weight, where a tree of selects takes 20, more than an H100 has at its full bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import HAS_TRITON, Impl, jit, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl


@dataclass(frozen=True)
class DequantizeLaunch:
    """words a program holds at once, how often it does so, and its warps; 32 * warps words are one a thread."""

    words: int = 256
    repeat: int = 4
    warps: int = 8


DEFAULT_LAUNCH = DequantizeLaunch()


def expand_absmax_reference(weight: Nf4Weight) -> Tensor:
    """(blocks,) float32 absmax, expanded if nested."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    inner = nested.absmax.repeat_interleave(nested.blocksize)[: weight.absmax.numel()]
    return nested.code[weight.absmax.long()] * inner + nested.offset


def nf4_dequantize_reference(
    weight: Nf4Weight, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """The plain-torch truth of `nf4_dequantize`, with the same arguments; float64 too, where nothing is rounded."""
    _check_out(weight, dtype, out)
    count = prod(weight.shape)
    pairs = torch.stack([weight.packed.flatten() >> 4, weight.packed.flatten() & 15], -1)  # (bytes, 2)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    absmax = expand_absmax_reference(weight).to(work).repeat_interleave(weight.blocksize)[:count]
    values = (weight.code.to(work)[pairs.flatten()[:count].long()] * absmax).to(dtype).view(weight.shape)
    return values if out is None else out.copy_(values)


def nf4_dequantize(
    weight: Nf4Weight,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    impl: Impl = "auto",
    launch: DequantizeLaunch = DEFAULT_LAUNCH,
) -> Tensor:
    """W in `dtype`, bit-equal to bitsandbytes' dequantize_4bit. No autograd: the weight is frozen.

    Args:
        weight: W of any shape and block size, absmax expanded or nested.
        dtype: bfloat16, float16 or float32.
        out: W's shape and `dtype`, receives the result; its rows may lie apart (the left columns of a wider buffer).
        impl: "auto" runs Triton where it serves, else the reference.
        launch: the kernel's shape; the default is meant for all.

    Returns:
        `out`, or a new contiguous tensor of W's shape.

    Raises:
        ValueError: an `out` or a dtype that does not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    if not takes_triton(impl, weight.packed):
        return nf4_dequantize_reference(weight, dtype, out)
    _check_out(weight, dtype, out)
    if dtype == torch.float64:
        raise ValueError("the kernel works in float32: float64 needs nf4_dequantize_reference")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    columns = weight.shape[-1]
    if not out.is_contiguous() and columns % 8:  # a word of 8 weights would end in another row
        return out.copy_(nf4_dequantize(weight, dtype, None, impl, launch))
    _run(weight, out, columns, launch)
    return out


def by_words(weight: Nf4Weight) -> bool:
    """Whether the kernel may read 32 bits at once: the bytes end with a word and start at one (a slice may not)."""
    return weight.packed.numel() % 4 == 0 and weight.packed.data_ptr() % 4 == 0


def _check_out(weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None) -> None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype must be a float of 16 bits or more, not {dtype}")
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (torch.Size(weight.shape), dtype, weight.packed.device):
        raise ValueError(f"out must be {weight.shape} {dtype}, not {tuple(out.shape)} {out.dtype} on {out.device}")
    if not out.is_contiguous() and (out.dim() != 2 or out.stride(1) != 1):
        raise ValueError("out must be contiguous, or 2-D with unit stride within a row")


def _run(weight: Nf4Weight, out: Tensor, columns: int, launch: DequantizeLaunch) -> None:
    count, nested, packed = prod(weight.shape), weight.nested, weight.packed
    if count == 0:
        return
    by_word = by_words(weight)
    with torch.cuda.device_of(packed):  # Triton launches on the current device, not on the tensor's
        _nf4_dequantize_kernel[(triton.cdiv(count, 8 * launch.words * launch.repeat),)](
            packed.flatten().view(torch.int32) if by_word else packed,
            weight.absmax,
            weight.code,
            nested.code if nested else weight.code,
            nested.absmax if nested else weight.code,
            nested.offset if nested else weight.code,
            out,
            count,
            columns,
            out.stride(0) if out.dim() > 1 else columns,
            BLOCKSIZE=weight.blocksize,
            INNER_BLOCKSIZE=nested.blocksize if nested else 0,
            BY_WORD=by_word,
            ROWS_APART=not out.is_contiguous(),
            WORDS=launch.words,
            REPEAT=launch.repeat,
            num_warps=launch.warps,
            enable_fp_fusion=False,  # code * absmax + offset is two roundings
        )


@jit
def load_absmax(absmax, block, inner_code, inner_absmax, offset, INNER_BLOCKSIZE: tl.constexpr):
    """absmax of these blocks in float32; INNER_BLOCKSIZE 0: it is not nested."""
    value = tl.load(absmax + block)
    if INNER_BLOCKSIZE > 0:
        inner = tl.load(inner_absmax + block // INNER_BLOCKSIZE)
        value = tl.load(inner_code + value.to(tl.int32)) * inner + tl.load(offset)
    return value


@jit
def _load_nibbles(packed, word, places, count, BY_WORD: tl.constexpr):
    """(words, 8) int32 in 0..15: the 8 weights of each 32-bit word, in order."""
    if BY_WORD:
        # Bytes come little end first, nibbles big end first: shifts 4, 0, 12, 8, 20, 16, 28, 24.
        packed_8 = tl.load(packed + word, mask=word * 8 < count, other=0)
        return (packed_8[:, None] >> (places * 4 + 4 - 8 * (places & 1))[None, :]) & 15
    element = word[:, None] * 8 + places[None, :]
    byte = tl.load(packed + element // 2, mask=element < count, other=0).to(tl.int32)
    return (byte >> (4 - 4 * (places & 1))[None, :]) & 15


@jit
def unpack_words(
    first,
    packed,
    scales,
    out,
    count,
    columns,
    row_stride,
    source,
    BLOCKSIZE: tl.constexpr,
    INNER_BLOCKSIZE: tl.constexpr,
    BY_WORD: tl.constexpr,
    ROWS_APART: tl.constexpr,
    SLICED: tl.constexpr,
    WORDS: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """WORDS * REPEAT words of 8 weights of `out` from `first` on, 64 bits: count may pass 2**31.

    source: SLICED, where out is part of W: (its first row, W's columns, its first column, end of what may be read).
    """
    absmax, code, inner_code, inner_absmax, offset = scales
    places = tl.arange(0, 8)
    for turn in tl.static_range(REPEAT):  # pyright: ignore
        word = first + turn * WORDS + tl.arange(0, WORDS)
        start, origin, end = word * 8, word, count
        if ROWS_APART:
            row, column = start // columns, start % columns
            start = row * row_stride + column
            if SLICED:
                first_row, width, first_column, end = source
                origin = ((row + first_row) * width + (column + first_column)) // 8
        nibbles = _load_nibbles(packed, origin, places, end, BY_WORD)
        block = tl.minimum(origin * 8, end - 1) // BLOCKSIZE
        scale = load_absmax(absmax, block, inner_code, inner_absmax, offset, INNER_BLOCKSIZE)
        values = tl.load(code + nibbles) * scale[:, None]
        address = start[:, None] + places[None, :]
        element = word[:, None] * 8 + places[None, :]
        tl.store(out + address, values.to(out.dtype.element_ty), mask=element < count)


@jit
def _nf4_dequantize_kernel(
    packed,
    absmax,
    code,
    inner_code,
    inner_absmax,
    offset,
    out,
    count,
    columns,
    row_stride,
    BLOCKSIZE: tl.constexpr,
    INNER_BLOCKSIZE: tl.constexpr,
    BY_WORD: tl.constexpr,
    ROWS_APART: tl.constexpr,
    WORDS: tl.constexpr,
    REPEAT: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (WORDS * REPEAT)
    scales = (absmax, code, inner_code, inner_absmax, offset)
    unpack_words(
        first,
        packed,
        scales,
        out,
        count,
        columns,
        row_stride,
        (0, columns, 0, count),
        BLOCKSIZE,
        INNER_BLOCKSIZE,
        BY_WORD,
        ROWS_APART,
        False,
        WORDS,
        REPEAT,
    )
