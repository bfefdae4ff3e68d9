"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467), alone or on a sum with the residual stream.

    y = x / sqrt(mean(x^2) + eps) * (weight + shift)

`cast_first` is Llama's order: normalise in float32, round to x's dtype, then multiply; without it (Gemma, with shift=1)
the product is taken in float32 and rounded once. The backward, with r = 1 / sqrt(mean(x^2) + eps), xh = x r and
g = dy (weight + shift), both in float32:

    dx = r (g - xh mean(g xh))          dweight = sum over rows of dy xh
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.rms_norm_math import rms_norm_backward, rms_norm_forward, serves
from slothrl_kernels.switch import Impl


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
    if not serves(impl, x):
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
    if not serves(impl, x):
        return add_rms_norm_reference(x, residual, weight, eps, shift, cast_first)
    return _RMSNorm.apply(x, residual, weight, eps, shift, cast_first)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None = None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x must be (..., H) floats, not {tuple(x.shape)} {x.dtype}")
    if weight is not None and (weight.shape != x.shape[-1:] or weight.device != x.device):
        raise ValueError(f"weight must be ({x.size(-1)},) on {x.device}, not {tuple(weight.shape)} on {weight.device}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"residual must match x: {tuple(x.shape)} {x.dtype} on {x.device}")


class _RMSNorm(torch.autograd.Function):
    """x [+ residual] -> (y, sum); of the forward only the sum (x itself where there is none) and r are kept."""

    @staticmethod
    def forward(
        ctx: Any, x, residual, weight, eps: float, shift: float, cast_first: bool
    ) -> tuple[Tensor, Tensor | None]:
        y, total, r = rms_norm_forward(x, residual, weight, eps, shift, cast_first, "triton")
        ctx.save_for_backward(total, weight, r)
        ctx.options = shift, cast_first, residual is not None
        ctx.set_materialize_grads(False)
        return y, None if residual is None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        to_y, to_sum = gradients
        total, weight, r = ctx.saved_tensors
        shift, cast_first, has_residual = ctx.options
        if to_y is None:
            return to_sum, to_sum if has_residual else None, None, None, None, None
        wanted = weight is not None and ctx.needs_input_grad[2]
        to_x, to_weight = rms_norm_backward(to_y, to_sum, total, r, weight, shift, cast_first, wanted, "triton")
        return to_x, to_x if has_residual else None, to_weight, None, None, None
