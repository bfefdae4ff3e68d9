"""Many small tensors cast into one piece of memory, each with a factor, in one launch: a layer's adapters.

torch's own way (`_foreach_copy_`, then `_foreach_mul_`) gives a program 65,536 values: 1.3 million of an 8B layer are
21 programs for 132 processors, 23 us for 8 MB on an H100, in every forward and backward of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.switch import HAS_TRITON, Impl, jit, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

SIZE = 2048  # values of a program
_tables: dict[tuple, tuple[Tensor, Tensor]] = {}  # for good, 1 KiB a layer: a CUDA graph reads one at every replay


@jit
def _cast_kernel(table, factors, like, out, SIZE: tl.constexpr):
    """table: (n, 3) int64, a source's address, its place in `out`, its values; like: any tensor of sources' dtype."""
    which = tl.program_id(1)
    source = tl.load(table + 3 * which).to(tl.pointer_type(like.dtype.element_ty))
    begin = tl.multiple_of(tl.load(table + 3 * which + 1), 8)
    count = tl.multiple_of(tl.load(table + 3 * which + 2), 8)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(tl.multiple_of(source, 16) + place, mask=place < count, other=0.0)
    rounded = value.to(out.dtype.element_ty).to(tl.float32)  # a power of two rounds nothing more
    tl.store(out + begin + place, (rounded * tl.load(factors + which)).to(out.dtype.element_ty), mask=place < count)


def cast_into_reference(
    out: Tensor, sources: Sequence[Tensor], begins: Sequence[int], factors: Sequence[float]
) -> None:
    """The plain-torch truth of `cast_into`, with the same arguments; float64 too."""
    targets = [out[begin : begin + x.numel()].view(x.shape) for begin, x in zip(begins, sources, strict=True)]
    torch._foreach_copy_(targets, list(sources))
    scaled = [(target, factor) for target, factor in zip(targets, factors, strict=True) if factor != 1.0]
    if scaled:
        torch._foreach_mul_([target for target, _ in scaled], [factor for _, factor in scaled])


def cast_into(
    out: Tensor, sources: Sequence[Tensor], begins: Sequence[int], factors: Sequence[float], impl: Impl = "auto"
) -> None:
    """Every source in out's dtype, times its factor after it is rounded, to its place in `out`.

    Args:
        out: (count,) of any float dtype; what no source covers is left as it is.
        sources: of any shapes, on out's device, without their history.
        begins: where in `out` each begins. factors: one each.
        impl: the kernel serves contiguous sources of one dtype that begin at multiples of 16 bytes, to multiples of 8
            values, in any dtype but float64; else the reference runs. In a capture it serves what it has served before.

    Raises:
        RuntimeError: impl="triton" and Triton is not installed.
    """
    if not sources:
        return
    table = _table(out, sources, begins, factors) if takes_triton(impl, out) and _fit(out, sources, begins) else None
    if table is None:
        cast_into_reference(out, sources, begins, factors)
        return
    largest = max(x.numel() for x in sources)
    with torch.cuda.device_of(out):
        _cast_kernel[(triton.cdiv(largest, SIZE), len(sources))](*table, sources[0], out, SIZE=SIZE, num_warps=4)


def _fit(out: Tensor, sources: Sequence[Tensor], begins: Sequence[int]) -> bool:
    dtype = sources[0].dtype
    if torch.float64 in (dtype, out.dtype) or out.data_ptr() % 16 or any(begin % 8 for begin in begins):
        return False
    return all(x.dtype == dtype and x.is_contiguous() and not (x.numel() % 8 or x.data_ptr() % 16) for x in sources)


def _table(
    out: Tensor, sources: Sequence[Tensor], begins: Sequence[int], factors: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """Says nothing but its own key, so it is never out of date; None in a capture, where none can be made."""
    rows = tuple((x.data_ptr(), begin, x.numel()) for x, begin in zip(sources, begins, strict=True))
    key = out.device, rows, tuple(factors)
    if key not in _tables:
        if out.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        values = torch.tensor(factors, dtype=torch.float32, device=out.device)
        _tables[key] = torch.tensor(rows, dtype=torch.int64, device=out.device), values
    return _tables[key]
