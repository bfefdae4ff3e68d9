"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467), alone or on a sum with the residual stream.

    y = x / sqrt(mean(x^2) + eps) * (weight + shift)

`cast_first` is Llama's order: normalise in float32, round to x's dtype, then multiply; without it (Gemma, with shift=1)
the product is taken in float32 and rounded once. The backward, with r = 1 / sqrt(mean(x^2) + eps), xh = x r and
g = dy (weight + shift), both in float32:

    dx = r (g - xh mean(g xh))          dweight = sum over rows of dy xh
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.rms_norm_kernels import backward_kernel, forward_kernel
from slothrl_kernels.switch import HAS_TRITON, Impl, processors, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton

MAX_WIDTH = 32768  # what a program holds of a row at once; wider rows run the reference
TILE = 4096  # elements a program holds where rows are short


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, shift: float = 0.0, cast_first: bool = True
) -> Tensor:
    """The plain-torch truth of `rms_norm`, with the same arguments; differentiable; float64 stays float64."""
    _check(x, weight)
    work = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(work) * torch.rsqrt(x.to(work).square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_first:
        return (normed.to(x.dtype).to(work) * (weight.to(work) + shift)).to(x.dtype)
    return (normed * (weight.to(work) + shift)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    shift: float = 0.0,
    cast_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """The plain-torch truth of `add_rms_norm`, with the same arguments."""
    _check(x, weight, residual)
    total = x + residual
    return rms_norm_reference(total, weight, eps, shift, cast_first), total


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    shift: float = 0.0,
    cast_first: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """RMSNorm over the last dimension; differentiable in x, and in weight where it requires grad.

    Args:
        x: (..., H) float32, bfloat16 or float16, any strides.
        weight: (H,) of any float dtype, or None for ones.
        eps: added to the mean square.
        shift: added to the weight; 1 for Gemma.
        cast_first: round to x's dtype before the weight (Llama, Qwen, Mistral) or after it (Gemma).
        impl: "auto" runs Triton where it serves, and rows of at most 32,768; else the reference.

    Returns:
        (..., H) of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    _check(x, weight)
    if not _takes_triton(impl, x):
        return rms_norm_reference(x, weight, eps, shift, cast_first)
    return _RMSNorm.apply(x, None, weight, eps, shift, cast_first)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    shift: float = 0.0,
    cast_first: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual), x + residual) in one pass over memory; the sum is rounded before it is normalised.

    Args, raises: as `rms_norm`; residual has x's shape and dtype.
    """
    _check(x, weight, residual)
    if not _takes_triton(impl, x):
        return add_rms_norm_reference(x, residual, weight, eps, shift, cast_first)
    return _RMSNorm.apply(x, residual, weight, eps, shift, cast_first)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None = None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x must be (..., H) floats, not {tuple(x.shape)} {x.dtype}")
    if weight is not None and (weight.shape != x.shape[-1:] or weight.device != x.device):
        raise ValueError(f"weight must be ({x.size(-1)},) on {x.device}, not {tuple(weight.shape)} on {weight.device}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"residual must match x: {tuple(x.shape)} {x.dtype} on {x.device}")


def _takes_triton(impl: Impl, x: Tensor) -> bool:
    return takes_triton(impl, x) and x.dtype != torch.float64 and 0 < x.size(-1) <= MAX_WIDTH


def rows_of(x: Tensor) -> Tensor:
    """(rows, H) with unit stride within a row; a view where the strides allow it."""
    flat = x.reshape(-1, x.size(-1))
    return flat if flat.stride(1) == 1 or flat.size(1) == 1 else flat.contiguous()


def _tile(width: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(16, TILE // columns))
    return columns, rows, max(1, min(16, rows * columns // 512))


class _RMSNorm(torch.autograd.Function):
    """x [+ residual] -> (y, sum); of the forward only the sum (x itself where there is none) and r are kept."""

    @staticmethod
    def forward(
        ctx: Any, x, residual, weight, eps: float, shift: float, cast_first: bool
    ) -> tuple[Tensor, Tensor | None]:
        inputs = rows_of(x)
        added = None if residual is None else rows_of(residual)
        (count, width), (columns, rows, warps) = inputs.shape, _tile(x.size(-1))
        y = torch.empty(count, width, dtype=x.dtype, device=x.device)
        total = inputs if added is None else torch.empty_like(y)
        scale = torch.empty(count, dtype=torch.float32, device=x.device)
        if count:
            with torch.cuda.device_of(x):
                forward_kernel[(triton.cdiv(count, rows),)](
                    inputs,
                    inputs if added is None else added,
                    inputs if weight is None else weight.contiguous(),
                    y,
                    total,
                    scale,
                    count,
                    width,
                    inputs.stride(0),
                    0 if added is None else added.stride(0),
                    float(eps),
                    float(shift),
                    HAS_RESIDUAL=added is not None,
                    HAS_WEIGHT=weight is not None,
                    CAST_FIRST=cast_first,
                    ROWS=rows,
                    COLUMNS=columns,
                    num_warps=warps,
                )
        ctx.save_for_backward(total, weight, scale)
        ctx.options = (x.shape, shift, cast_first, added is not None)
        ctx.set_materialize_grads(False)
        return y.view(x.shape), None if added is None else total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        to_y, to_sum = gradients
        total, weight, scale = ctx.saved_tensors
        shape, shift, cast_first, has_residual = ctx.options
        if to_y is None:
            return to_sum, to_sum if has_residual else None, None, None, None, None
        wants_weight = weight is not None and ctx.needs_input_grad[2]
        to_x, to_weight = _backward(rows_of(to_y), to_sum, total, weight, scale, shift, cast_first, wants_weight)
        to_x = to_x.view(shape)
        return to_x, to_x if has_residual else None, to_weight, None, None, None


def _backward(to_y, to_sum, total, weight, scale, shift, cast_first, wants_weight) -> tuple[Tensor, Tensor | None]:
    """dx (rows, H), and dweight where it is wanted: a partial sum a program, added up by torch."""
    (count, width), (columns, rows, warps) = total.shape, _tile(total.size(1))
    to_x = torch.empty(count, width, dtype=total.dtype, device=total.device)
    blocks = triton.cdiv(count, rows)
    programs = min(blocks, 4 * processors(total.device)) if wants_weight else blocks
    partials = torch.empty(programs if wants_weight else 1, width, dtype=torch.float32, device=total.device)
    added = None if to_sum is None else rows_of(to_sum)
    if count:
        with torch.cuda.device_of(total):
            backward_kernel[(programs,)](
                to_y,
                to_y if added is None else added,
                total,
                total if weight is None else weight.contiguous(),
                scale,
                to_x,
                partials,
                count,
                width,
                to_y.stride(0),
                0 if added is None else added.stride(0),
                total.stride(0),
                float(shift),
                triton.cdiv(blocks, programs),
                HAS_SUM=added is not None,
                HAS_WEIGHT=weight is not None,
                WANTS_WEIGHT=wants_weight,
                CAST_FIRST=cast_first,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=warps,
            )
    return to_x, partials.sum(0).to(weight.dtype) if wants_weight else None  # pyright: ignore
