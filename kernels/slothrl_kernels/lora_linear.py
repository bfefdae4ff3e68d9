"""Linear layers with LoRA over a frozen base, one or several that share their input, under autograd.

The forward keeps x and x A'^T (M, R) and nothing of the size of an output; the maths and the layouts are `lora_math`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.base_weight import dense
from slothrl_kernels.lora_math import Layout, Projection, input_gradient, parameter_gradients, project, settle
from slothrl_kernels.switch import Impl

Dropout = Callable[[Tensor], Tensor]


def lora_linear_reference(
    x: Tensor,
    group: Sequence[Projection],
    dropout: Sequence[Dropout | None] = (),
    lora_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The plain-torch truth of `lora_linear`: PEFT's order of operations; differentiable; float64 too."""
    check_group(x, group, dropout)
    outputs = []
    for i, p in enumerate(group):
        bias = None if p.bias is None else p.bias.to(x.dtype)
        y = F.linear(x, dense(p.weight, x.dtype, impl="torch"), bias)
        outputs.append(_add_lora(y, x, p, dropout[i] if dropout else None, lora_dtype or x.dtype))
    return outputs


def lora_linear(
    x: Tensor,
    group: Sequence[Projection],
    dropout: Sequence[Dropout | None] = (),
    lora_dtype: torch.dtype | None = None,
    layout: Layout = "auto",
    impl: Impl = "auto",
) -> list[Tensor]:
    """y_i = x W_i^T + b_i + s_i B_i A_i x for every projection of a group; gradients for x, A_i, B_i and b_i.

    Args:
        x: (..., K) bfloat16, float16 or float32, the dtype of the computation; any strides.
        group: projections of K inputs; W_i nf4, int8 or dense, frozen: they get no gradient.
        dropout: one a projection, or none. A projection with one takes its LoRA's input through it, as PEFT does, so
            that the random numbers are PEFT's; only the base is fused then.
        lora_dtype: what A and B work in; None for x's dtype. PEFT's float32 adapters work in float32 over 16-bit x
            where autocast is off; only the base is fused then.
        layout: how the rank products ride with the base GEMM; "auto" goes by bytes moved.
        impl: of the nf4 kernels.

    Returns:
        One (..., N_i) of x's dtype each. Sums are float32; the scaling is folded into A, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown layout, a base weight that requires grad.
    """
    check_group(x, group, dropout)
    settle(group, 0, layout)
    apart = any(dropout) or (lora_dtype is not None and lora_dtype != x.dtype)
    fused = [Projection(p.weight, p.bias) for p in group] if apart else group
    tensors = [t for p in fused for t in (p.a, p.b, p.bias)]
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled: autocast would choose anew
        outputs = list(_LoraLinear.apply(x, fused, layout, impl, *tensors))  # pyright: ignore
        if apart:
            for i, p in enumerate(group):
                outputs[i] = _add_lora(outputs[i], x, p, dropout[i] if dropout else None, lora_dtype or x.dtype)
    return outputs


def _add_lora(y: Tensor, x: Tensor, p: Projection, dropout: Dropout | None, dtype: torch.dtype) -> Tensor:
    if p.a is None or p.b is None:
        return y
    inputs = x.to(dtype)
    inputs = dropout(inputs) if dropout else inputs
    update = F.linear(F.linear(inputs, p.a.to(dtype)), p.b.to(dtype)) * p.scaling
    return (y + update).to(y.dtype)


def check_group(x: Tensor, group: Sequence[Projection], dropout: Sequence[Dropout | None] = ()) -> None:
    """Raise ValueError where shapes do not fit or a base weight requires grad."""
    if not group or (dropout and len(dropout) != len(group)):
        raise ValueError(f"{len(group)} projections and {len(dropout)} dropouts: one each, or no dropout")
    for p in group:
        outputs, inputs = p.weight.shape
        shapes = [None if t is None else tuple(t.shape) for t in (p.a, p.b, p.bias)]
        right = [(p.rank, inputs), (outputs, p.rank)] if p.a is not None else [None, None]
        right = [*right, None if p.bias is None else (outputs,)]
        if x.dim() < 1 or not x.is_floating_point() or x.size(-1) != inputs or shapes != right:
            raise ValueError(f"x {tuple(x.shape)}, W {(outputs, inputs)} and A, B, bias {shapes} do not fit")
        if isinstance(p.weight, Tensor) and p.weight.requires_grad:
            raise ValueError("the base weight requires grad, and would get none: freeze it, or use plain torch")


class _LoraLinear(torch.autograd.Function):
    """(x, group, layout, impl, A_1, B_1, bias_1, …) -> y_1, …; the tensors are given again for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Sequence[Projection], layout: Layout, impl: Impl, *tensors) -> tuple:
        flat = x.reshape(-1, x.size(-1))
        outputs, xa = project(flat, group, layout, impl)
        # dx needs weights only.
        trains = any(ctx.needs_input_grad[4 + 3 * i] or ctx.needs_input_grad[5 + 3 * i] for i in range(len(group)))
        ctx.save_for_backward(x if trains else None, xa if trains else None)
        ctx.made_of, ctx.shape = (group, layout, impl), x.shape
        return tuple(y.view(*x.shape[:-1], y.size(1)) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_y: Tensor) -> tuple:
        (x, xa), (group, layout, impl), wants = ctx.saved_tensors, ctx.made_of, ctx.needs_input_grad
        flat = [to.reshape(-1, to.size(-1)) for to in to_y]
        x = None if x is None else x.reshape(-1, x.size(-1))
        with torch.autocast(flat[0].device.type, enabled=False):
            to_x, to_xa = input_gradient(flat, group, wants[0], layout, impl)
            found = parameter_gradients(x, xa, to_xa, flat, group, wants[6::3])
        return None if to_x is None else to_x.view(ctx.shape), None, None, None, *found
