"""A decoder layer with LoRA on its projections as one step of autograd, with what it keeps chosen by its caller.

    u = x + o(attention(q, k, v of norm(x)))        y = u + down(act(gate) * up), gate and up of norm(u)

The forward runs kernels and GEMMs and no autograd. The backward computes again what was not kept, and never the output
of down, nor anything behind it: y is no gradient's factor. Attention alone is differentiated by whoever computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.glu import glu_backward, glu_forward
from slothrl_kernels.layer_attention import Attended, attend, attend_backward, norm_into, project_qkv
from slothrl_kernels.layer_parts import LayerParts, Norm
from slothrl_kernels.lora_group import LoraGroup, LoraOnto
from slothrl_kernels.rms_norm_math import rms_norm_backward

HOLD = 4  # unpacked weights stay between recomputation and gradient where tokens are this many times the input's width


def decoder_layer(x: Tensor, parts: LayerParts, save: bool = True) -> Tensor:
    """One decoder layer; gradients for x and for every adapter.

    Args:
        x: (B, S, h) bfloat16, float16, float32 or float64, the dtype of the computation.
        parts: what the layer is made of; see `LayerParts`.
        save: let autograd keep x, so that hooks on saved tensors see it; False: keep it past them. Inside of
            `torch.utils.checkpoint`, whose hooks would run the layer once more for it.

    Returns:
        (B, S, h) of x's dtype.

    Raises:
        ValueError: shapes that do not fit, or a parameter that requires grad and is no adapter.
    """
    parts.check(x)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled: autocast would choose anew
        return _DecoderLayer.apply(x, parts, save, *parts.adapters())  # pyright: ignore


class _Kept(NamedTuple):
    """What a forward left for its backward beside x; None: to be computed again. u (M, h), inner (M, 2 F)."""

    attended: Attended | None = None
    u: Tensor | None = None
    inner: Tensor | None = None


class _DecoderLayer(torch.autograd.Function):
    """(x, parts, save, A and B of every projection) -> y; the adapters are given again for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: LayerParts, save: bool, *adapters: Tensor | None) -> Tensor:
        flat, follows = x.reshape(-1, x.size(-1)), any(ctx.needs_input_grad)
        keep = parts.keep if follows else "input"
        qkv = project_qkv(flat, parts, hold=False)[3]
        attended = attend(qkv, x.shape, parts, watched=keep != "input")
        del qkv
        u, _ = LoraOnto(parts.o, flat, parts.impl).forward(attended.rows, flat)
        attended = attended if keep != "input" else None
        *_, inner = _project_inner(u, parts, hold=False)
        gate, up = inner.chunk(2, 1)
        h = glu_forward(gate, up, parts.activation, parts.impl)
        kept = _Kept(attended, u, inner) if keep == "all" else _Kept(attended)
        del inner, gate, up
        y, _ = LoraOnto(parts.down, flat, parts.impl).forward(h, u)
        if follows:
            ctx.parts, ctx.kept = parts, kept
            ctx.versions = _versions(adapters)
            ctx.save_for_backward(x if save else None)
            ctx.held = None if save else x
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_y: Tensor) -> tuple:
        x = ctx.saved_tensors[0] if ctx.held is None else ctx.held
        kept, ctx.kept = ctx.kept, _Kept()  # attention's own graph serves once
        flat = x.reshape(-1, x.size(-1))
        if _versions(ctx.parts.adapters()) != ctx.versions:
            raise RuntimeError("an adapter was written to between the forward and its backward")
        with torch.autocast(x.device.type, enabled=False):
            to_x, found = _backward(flat, to_y[0].reshape(flat.shape), x.shape, ctx.parts, kept)
        return to_x.view(x.shape), None, None, *found


def _versions(adapters: Sequence[Tensor | None]) -> list[int]:
    return [t._version for t in adapters if t is not None]


def _backward(
    x: Tensor, to_y: Tensor, shape: torch.Size, parts: LayerParts, kept: _Kept
) -> tuple[Tensor, list[Tensor | None]]:
    """dx (M, h) and the adapters' gradients, from x (M, h), dy (M, h) and what was kept."""
    onto, hold = LoraOnto(parts.o, x, parts.impl), x.size(0) >= HOLD * x.size(1)
    group, both, r, qkv = _qkv_again(x, parts, kept, hold)
    attended = kept.attended or attend(qkv, shape, parts, watched=True)  # pyright: ignore
    rows = attended.rows
    if kept.u is None:
        u, shrunk = onto.forward(rows, x)
    else:
        u, shrunk = kept.u, onto.shrink(rows)
    to_u, below = _mlp_backward(u, to_y, parts, onto.buffer(x.size(0)), kept.inner, hold)
    del u, qkv
    to_rows = onto.input_gradient(to_u)
    middle = onto.parameter_gradients(rows, shrunk, to_u)
    del rows, shrunk
    to_qkv = attend_backward(to_rows, attended, shape, parts)
    del to_rows, attended
    to_n, to_xa = group.input_gradient(to_qkv)
    above = group.parameter_gradients(both, to_xa, to_qkv)
    del both, to_qkv
    to_x = _norm_backward(to_n, to_u[:, : x.size(1)], x, r, parts.first, parts)
    return to_x, [*above, *middle, *below]


def _qkv_again(
    x: Tensor, parts: LayerParts, kept: _Kept, hold: bool
) -> tuple[LoraGroup, Tensor, Tensor, Tensor | None]:
    """`project_qkv`, without its GEMM where attention was kept."""
    if kept.attended is None:
        return project_qkv(x, parts, hold)
    group = LoraGroup(parts.qkv, x, parts.impl)
    both = group.buffer(x.size(0))
    r = norm_into(both[:, : x.size(1)], x, parts.first, parts)
    group.shrink_into(both)
    return group, both, r, None


def _project_inner(u: Tensor, parts: LayerParts, hold: bool) -> tuple[LoraGroup, Tensor, Tensor, Tensor]:
    """As `project_qkv`, of gate and up, beside each other (M, 2 F)."""
    group = LoraGroup(parts.inner, u, parts.impl)
    both = group.buffer(u.size(0))
    r = norm_into(both[:, : u.size(1)], u, parts.second, parts)
    return group, both, r, group.forward(both, hold)


def _mlp_backward(
    u: Tensor, to_y: Tensor, parts: LayerParts, out: Tensor, inner: Tensor | None, hold: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """`out` with du in its left columns (M, h), and the adapters' gradients of gate, up and down."""
    if inner is None:
        group, both, r, inner = _project_inner(u, parts, hold)
    else:
        group = LoraGroup(parts.inner, u, parts.impl)
        both = group.buffer(u.size(0))
        r = norm_into(both[:, : u.size(1)], u, parts.second, parts)
        group.shrink_into(both)
    down = LoraOnto(parts.down, u, parts.impl)
    upstream = down.buffer(u.size(0))
    upstream[:, : u.size(1)] = to_y
    to_h = down.input_gradient(upstream)
    # One pass gives h, dgate and dup, over the memory of dh, gate and up where a kernel runs.
    h, to_inner = _glu_backward(inner, to_h, parts)
    del inner, to_h
    below = down.parameter_gradients(h, down.shrink(h), upstream)
    del h, upstream
    to_n, to_xa = group.input_gradient(to_inner)
    above = group.parameter_gradients(both, to_xa, to_inner)
    del both, to_inner
    _norm_backward(to_n, to_y, u, r, parts.second, parts, out[:, : u.size(1)])
    return out, [*above, *below]


def _glu_backward(inner: Tensor, to_h: Tensor, parts: LayerParts) -> tuple[Tensor, Tensor]:
    """h (M, F), and the gradient of gate and up beside each other (M, 2 F)."""
    gate, up = inner.chunk(2, 1)
    h, to_gate, to_up = glu_backward(gate, up, to_h, parts.activation, parts.impl, in_place=True)
    written_over = to_gate.data_ptr() == gate.data_ptr()
    return h, inner if written_over else torch.cat([to_gate, to_up], 1)


def _norm_backward(
    to_y: Tensor, to_sum: Tensor, x: Tensor, r: Tensor, norm: Norm, parts: LayerParts, out: Tensor | None = None
) -> Tensor:
    options = (norm.weight, norm.shift, norm.cast_first)
    return rms_norm_backward(to_y, to_sum, x, r, *options, impl=parts.impl, out=out)[0]
