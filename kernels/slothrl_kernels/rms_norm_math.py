"""RMSNorm's values and gradients without autograd, for whoever keeps what the backward needs itself.

The maths is `rms_norm`'s; the two functions run its kernels, or the same formulas in plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.rms_norm_kernels import backward_kernel, forward_kernel
from slothrl_kernels.switch import HAS_TRITON, Impl, processors, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton

MAX_WIDTH = 32768  # what a program holds of a row at once; wider rows run the reference
TILE = 4096  # elements a program holds where rows are short


def serves(impl: Impl, x: Tensor) -> bool:
    """Whether the kernels run on x: see `takes_triton`; not in float64, nor on rows of more than 32,768."""
    return takes_triton(impl, x) and x.dtype != torch.float64 and 0 < x.size(-1) <= MAX_WIDTH


def rms_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    shift: float = 0.0,
    cast_first: bool = True,
    impl: Impl = "auto",
    out: Tensor | None = None,
    total_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, total, r): y = RMSNorm(total), total = x + residual rounded to x's dtype, r = 1 / sqrt(mean(total^2) + eps).

    Args:
        x, residual: (..., H) of one dtype, any strides; residual None: total is x itself.
        weight, eps, shift, cast_first, impl: as `rms_norm`.
        out: where y goes, x's shape and dtype: rows of unit stride at one distance, as the left part of a wider buffer.
        total_out: where the sum goes, the same; may be x or residual. Not looked at without a residual.

    Returns:
        y and total (..., H); r (rows,) float32 (float64 where x is). `rms_norm_backward` needs total and r.
    """
    if not serves(impl, x):
        return _forward_reference(x, residual, weight, eps, shift, cast_first, out, total_out)
    rows, added = rows_of(x), None if residual is None else rows_of(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    total = x if residual is None else total_out
    if total is None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    targets = [_rows_to_write(y), rows if added is None else _rows_to_write(total)]
    (count, width), (columns, block, warps) = rows.shape, tile_of(x.size(-1))
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(count, block),)](
                rows, rows if added is None else added, rows if weight is None else weight.contiguous(), *targets,
                scale, count, width, rows.stride(0), 0 if added is None else added.stride(0),
                *(target.stride(0) for target in targets), float(eps), float(shift), HAS_RESIDUAL=added is not None,
                HAS_WEIGHT=weight is not None, CAST_FIRST=cast_first, ROWS=block, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return y, total, scale


def rms_norm_backward(
    to_y: Tensor,
    to_total: Tensor | None,
    total: Tensor,
    r: Tensor,
    weight: Tensor | None,
    shift: float = 0.0,
    cast_first: bool = True,
    wants_weight: bool = False,
    impl: Impl = "auto",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) from the gradients of y and, where somebody read it, of total; dx is the residual's gradient too.

    Args:
        to_y, to_total: (..., H) of total's dtype, any strides; to_total None: nobody read the sum.
        total, r: as `rms_norm_forward` returned them; weight, shift, cast_first, impl as it was given them.
        wants_weight: whether dweight (H,), of weight's dtype, is computed; else it is None.
        out: where dx goes, as in `rms_norm_forward`; may be to_y or to_total.
    """
    if not serves(impl, total):
        return _backward_reference(to_y, to_total, total, r, weight, shift, cast_first, wants_weight, out)
    sums, gradients = rows_of(total), rows_of(to_y)
    added = None if to_total is None else rows_of(to_total)
    to_x = torch.empty(total.shape, dtype=total.dtype, device=total.device) if out is None else out
    target = _rows_to_write(to_x)
    (count, width), (columns, block, warps) = sums.shape, tile_of(total.size(-1))
    blocks = triton.cdiv(count, block)
    programs = min(blocks, 4 * processors(total.device)) if wants_weight else blocks
    partials = torch.empty(programs, width, dtype=torch.float32, device=total.device) if wants_weight else r
    if count:
        with torch.cuda.device_of(total):
            backward_kernel[(programs,)](
                gradients, gradients if added is None else added, sums, sums if weight is None else weight.contiguous(),
                r, target, partials, count, width, gradients.stride(0), 0 if added is None else added.stride(0),
                sums.stride(0), target.stride(0), float(shift), triton.cdiv(blocks, programs),
                HAS_SUM=added is not None, HAS_WEIGHT=weight is not None, WANTS_WEIGHT=wants_weight,
                CAST_FIRST=cast_first, ROWS=block, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return to_x, partials.sum(0).to(weight.dtype) if wants_weight else None  # pyright: ignore


def _forward_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, shift: float, cast_first: bool,
    out: Tensor | None, total_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = x if residual is None else torch.add(x, residual, out=total_out)
    value = total.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    normed = value * r
    if weight is not None:
        normed = normed.to(x.dtype).to(value.dtype) if cast_first else normed
        normed = normed * (weight.to(value.dtype) + shift)
    y = normed.to(x.dtype) if out is None else out.copy_(normed)
    return y, total, r.flatten()


def _backward_reference(
    to_y: Tensor, to_total: Tensor | None, total: Tensor, r: Tensor, weight: Tensor | None, shift: float,
    cast_first: bool, wants_weight: bool, out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    work = torch.promote_types(total.dtype, torch.float32)
    gradient, scale = to_y.to(work), r.to(work).view(*total.shape[:-1], 1)
    normed = total.to(work) * scale
    weighted = gradient if weight is None else gradient * (weight.to(work) + shift)
    result = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    result = result if to_total is None else result + to_total.to(work)
    to_weight = None
    if wants_weight:
        normed = normed.to(total.dtype).to(work) if cast_first else normed
        to_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)  # pyright: ignore
    return result.to(total.dtype) if out is None else out.copy_(result), to_weight


def rows_of(x: Tensor) -> Tensor:
    """(rows, H) with unit stride within a row; a view where the strides allow it."""
    flat = x.reshape(-1, x.size(-1))
    return flat if flat.stride(1) == 1 or flat.size(1) == 1 else flat.contiguous()


def _rows_to_write(x: Tensor) -> Tensor:
    """(rows, H), a view in any case, since it is written to."""
    flat = x.view(-1, x.size(-1))
    if flat.stride(1) != 1 and flat.size(1) > 1:
        raise ValueError(f"an output's rows must have unit stride, not {flat.stride(1)}")
    return flat


def tile_of(width: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program: where it holds several rows four warps were faster than eight (H100)."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(16, TILE // columns))
    return columns, rows, max(1, min(4 if rows > 1 else 16, rows * columns // 512))
