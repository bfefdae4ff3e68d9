"""A gated MLP with LoRA on its three projections, y = down(act(gate(x)) * up(x)), as one step of autograd.

What it keeps is the caller's choice, M tokens of width K and F inner features:

    recompute=False    x (M, K), gate and up (M, F): the backward repeats act(gate) * up, in the pass of its gradient
    recompute=True     x alone: the backward runs the gate and up projections once more, and never down, whose output no
                       gradient needs

Inside of `torch.utils.checkpoint` recompute=True is the one to take: x is kept by a step of its own before anything is
computed, so that the checkpoint's recomputation, which stops at the last tensor it needs, stops before the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.glu import Activation, glu, glu_backward, glu_reference
from slothrl_kernels.lora_linear import check_group, lora_linear_reference
from slothrl_kernels.lora_math import Projection, input_gradient, parameter_gradients, project, stacked_a
from slothrl_kernels.switch import Impl


def lora_mlp_reference(
    x: Tensor, inner: Sequence[Projection], down: Projection, activation: Activation = "silu"
) -> Tensor:
    """The plain-torch truth of `lora_mlp`: PEFT's order of operations; differentiable; float64 too."""
    gate, up = _halves(lora_linear_reference(x, inner))
    return lora_linear_reference(glu_reference(gate, up, activation), [down])[0]


def lora_mlp(
    x: Tensor,
    inner: Sequence[Projection],
    down: Projection,
    activation: Activation = "silu",
    recompute: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """down(act(gate(x)) * up(x)); gradients for x, every A and B, and biases.

    Args:
        x: (..., K) bfloat16, float16 or float32, the dtype of the computation.
        inner: the gate and the up projection, K -> F each, or one K -> 2F with the gate's rows first.
        down: F -> K'. All adapters work in x's dtype.
        activation: "silu", "gelu" or "gelu_tanh".
        recompute: keep x alone, see the head of this file; only where x requires grad.
        impl: of the kernels.

    Returns:
        (..., K') of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a base weight that requires grad.
    """
    features = sum(p.weight.shape[0] for p in inner) // 2
    if len(inner) not in (1, 2) or (len(inner) == 2 and features != inner[0].weight.shape[0]):
        raise ValueError(f"inner must be gate and up, or both in one, not {[tuple(p.weight.shape) for p in inner]}")
    check_group(x, inner)
    check_group(x.new_empty(0, features), [down])
    tensors = [t for p in (*inner, down) for t in (p.a, p.b, p.bias)]
    made_of = (inner, [down], activation, impl)
    with torch.autocast(x.device.type, enabled=False):
        if not (recompute and x.requires_grad and torch.is_grad_enabled()):
            return _LoraMLP.apply(x, made_of, None, *tensors)  # pyright: ignore
        kept = _Kept()
        return _LoraMLP.apply(_Keep.apply(x, kept), made_of, kept, *tensors)  # pyright: ignore


class _Kept:
    """The way to x: the context of the step that keeps it."""

    ctx: Any = None


class _Keep(torch.autograd.Function):
    """x -> x, kept by autograd here, for `_LoraMLP` to ask for it in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: _Kept) -> Tensor:
        ctx.save_for_backward(x)
        kept.ctx = ctx
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_x: Tensor) -> tuple:
        return to_x[0], None


class _LoraMLP(torch.autograd.Function):
    """(x, made_of, kept or None, A, B and bias of gate, up and down) -> y; the tensors are given again for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made_of: tuple, kept: _Kept | None, *tensors) -> Tensor:
        (inner, outer, activation, impl), flat = made_of, x.reshape(-1, x.size(-1))
        outputs, xa = project(flat, inner, impl=impl)
        gate, up = _halves(outputs)
        (y,), ha = project(glu(gate, up, activation, impl), outer, impl=impl)
        if kept is None:
            ctx.save_for_backward(x, xa, ha, *outputs)
        ctx.made_of, ctx.kept, ctx.shape = made_of, kept, x.shape
        return y.view(*x.shape[:-1], y.size(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_y: Tensor) -> tuple:
        (inner, outer, activation, impl), kept, wants = ctx.made_of, ctx.kept, ctx.needs_input_grad
        with torch.autocast(to_y[0].device.type, enabled=False):
            if kept is None:
                x, xa, ha, *outputs = ctx.saved_tensors
                x = x.reshape(-1, x.size(-1))
            else:
                x, ha = kept.ctx.saved_tensors[0].reshape(-1, ctx.shape[-1]), None
                outputs, xa = project(x, inner, impl=impl)
            to = [to_y[0].reshape(-1, to_y[0].size(-1))]
            # dh first: then one pass gives h, dgate and dup.
            to_h, to_ha = input_gradient(to, outer, impl=impl)
            assert to_h is not None
            h, *to_inner = glu_backward(*_halves(outputs), to_h, activation, impl, in_place=kept is not None)
            to_inner = to_inner if len(inner) == 2 else [torch.cat(to_inner, 1)]
            del outputs, to_h
            if ha is None and (a := stacked_a(outer, h)) is not None:
                ha = h @ a.T
            below = parameter_gradients(h, ha, to_ha, to, outer, wants[-1:])
            del h
            to_x, to_xa = input_gradient(to_inner, inner, wants[0], impl=impl)
            above = parameter_gradients(x, xa, to_xa, to_inner, inner, wants[5:-3:3])
        return None if to_x is None else to_x.view(ctx.shape), None, None, *above, *below


def _halves(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """gate and up, of one projection or of two."""
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
    return gate, up
