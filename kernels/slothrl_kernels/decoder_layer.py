"""A decoder layer with LoRA on its projections as one step of autograd, with what it keeps chosen by its caller.

    u = x + o(attention(q, k, v of norm(x)))        y = u + down(act(gate) * up), gate and up of norm(u)

with a norm of what o and down give before it is added, where `LayerParts.after` has them (`layer_residual`).

The forward runs kernels and GEMMs and no autograd. The backward computes again what was not kept, and not the output of
down where no norm follows it: y is no gradient's factor. Attention alone is differentiated by whoever computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.glu import glu_forward
from slothrl_kernels.layer_attention import Attended, Parked, attend, attend_backward, kept_of
from slothrl_kernels.layer_mlp import glu_gradients, product, tiled_backward, tiles_of
from slothrl_kernels.layer_parts import LayerParts, Norm
from slothrl_kernels.layer_residual import Added, add_onto, gradient_of_made
from slothrl_kernels.lora_flat import AdapterGradients, Adapters, adapter_values
from slothrl_kernels.lora_group import LoraGroup
from slothrl_kernels.lora_math import Projection
from slothrl_kernels.lora_onto import LoraOnto
from slothrl_kernels.rms_norm_math import rms_norm_backward, rms_norm_forward
from slothrl_kernels.row_copy import copy_rows

HOLD = 4  # how many times a layer's width its tokens must be


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
    """What a forward left for its backward beside x; None: to be computed again. u (M, h), inner (M, 2 F); of_o and
    of_down (M, h): what these gave, where a norm follows."""

    adapters: list[Adapters] | None = None
    attended: Attended | Parked | None = None
    u: Tensor | None = None
    inner: Tensor | None = None
    of_o: Tensor | None = None
    of_down: Tensor | None = None


class _Normed(NamedTuple):
    """A norm's result and the projections of it: both [norm(x) | its x A'^T] (M, h + R), r (M,)."""

    group: LoraGroup
    both: Tensor
    r: Tensor


class _DecoderLayer(torch.autograd.Function):
    """(x, parts, save, A and B of every projection) -> y; the adapters are given again for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: LayerParts, save: bool, *adapters: Tensor | None) -> Tensor:
        flat, follows = x.reshape(-1, x.size(-1)), any(ctx.needs_input_grad)
        keep = parts.keep if follows else "input"
        values = adapter_values(parts.groups, flat)
        normed = _normed(flat, parts.first, parts.qkv, values[0], parts)
        attended = attend(normed.group.forward(normed.both), x.shape, parts, watched=keep != "input")
        (u, of_o), _ = _onto_residual(LoraOnto(parts.o, values[1], flat, parts.impl), attended.rows, flat, parts)
        attended = kept_of(attended, parts) if follows else None
        normed = _normed(u, parts.second, parts.inner, values[2], parts)
        down = LoraOnto(parts.down, values[3], flat, parts.impl)
        both, inner = product(normed.group, normed.both, down, parts, kept=keep == "all")
        del normed
        over = u if keep != "all" and parts.after is None else None  # nobody needs u any more
        y, of_down = add_onto(down, both, u, parts.after_down(), parts.impl, over)
        if follows:
            all_of_it = (u, inner, of_o, of_down) if keep == "all" else ()
            ctx.kept = _Kept(values if _holds(flat) else None, attended, *all_of_it)
            ctx.parts = parts._replace(keeper=None)  # it serves once too: a second backward keeps nothing
            ctx.versions, ctx.held = _versions(adapters), None if save else x
            ctx.save_for_backward(x if save else None)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_y: Tensor) -> tuple:
        x = ctx.saved_tensors[0] if ctx.held is None else ctx.held
        kept, ctx.kept = ctx.kept, _Kept()  # attention's own graph serves once
        if _versions(ctx.parts.adapters()) != ctx.versions:
            raise RuntimeError("an adapter was written to between the forward and its backward")
        with torch.autocast(x.device.type, enabled=False):
            to_x, found = _backward(x, to_y[0].reshape(-1, x.size(-1)), ctx.parts, kept)
        return to_x.view(x.shape), None, None, *found


def _backward(x: Tensor, to_y: Tensor, parts: LayerParts, kept: _Kept) -> tuple[Tensor, list[Tensor | None]]:
    """dx (M, h) and the adapters' gradients, from x (B, S, h), dy (M, h) and what was kept."""
    shape, x = x.shape, x.reshape(-1, x.size(-1))
    values = kept.adapters or adapter_values(parts.groups, x)
    gradients = AdapterGradients(parts.groups, x)
    normed, attended = None, kept.attended
    if attended is None:
        normed = _normed(x, parts.first, parts.qkv, values[0], parts)
        attended = attend(normed.group.forward(normed.both, _holds(x)), shape, parts, watched=True)
    onto, rows = LoraOnto(parts.o, values[1], x, parts.impl), attended.rows
    if kept.u is None:
        (u, of_o), shrunk = _onto_residual(onto, rows, x, parts)
        shrunk = shrunk.contiguous()
    else:
        u, of_o, shrunk = kept.u, kept.of_o, onto.shrink(rows)
    to_u = _mlp_backward(u, to_y, parts, values[2:], (kept.inner, kept.of_down), onto, gradients.found[2:])
    del u
    to_o = _before_norm(to_u, of_o, parts, onto)  # [do | do B]
    to_rows = onto.input_gradient(to_o)
    onto.parameter_gradients(rows, shrunk, to_o, gradients.found[1])
    del rows, shrunk, of_o, to_o
    if normed is None:  # no sooner: memory is fullest in the MLP
        normed = _normed(x, parts.first, parts.qkv, values[0], parts)
        normed.group.shrink_into(normed.both)
    upstream = normed.group.upstream(x.size(0))
    attend_backward(to_rows, attended, shape, parts, upstream[:, : normed.group.outputs])
    del to_rows, attended
    to_n = normed.group.backward(normed.both, upstream, gradients.found[0])
    del upstream
    to_x = _norm_backward(to_n, to_u[:, : x.size(1)], x, normed.r, parts.first, parts)
    return to_x, gradients.finish()


def _mlp_backward(
    u: Tensor,
    to_y: Tensor,
    parts: LayerParts,
    values: list[Adapters],
    kept: tuple[Tensor | None, Tensor | None],
    onto: LoraOnto,
    gradients: list[Adapters],
) -> Tensor:
    """A buffer of `onto` with du (M, h) in it; the gradients of the adapters of gate, up and down go into theirs.

    kept: gate and up (M, 2 F), and what down gave (M, h), as in `_Kept`.
    """
    normed = _normed(u, parts.second, parts.inner, values[0], parts)
    down = LoraOnto(parts.down, values[1], u, parts.impl)
    inner, of_down = kept
    if parts.after is not None and of_down is None:
        inner, of_down = _down_again(normed, down, parts)
    upstream = down.buffer(u.size(0))
    if parts.after is None or of_down is None:
        copy_rows(upstream[:, : u.size(1)], to_y)
    else:
        gradient_of_made(to_y, of_down, parts.after[1], upstream[:, : u.size(1)], parts.impl)
    del of_down, kept
    to_n = _inner_backward(normed, down, upstream, parts, inner, gradients)
    del upstream
    out = onto.buffer(u.size(0))  # no sooner: gate, up and their weights are what a layer needs most memory for
    _norm_backward(to_n, to_y, u, normed.r, parts.second, parts, out[:, : u.size(1)])
    return out


def _down_again(normed: _Normed, down: LoraOnto, parts: LayerParts) -> tuple[Tensor, Tensor]:
    """gate and up (M, 2 F), all at once since h needs them whole, and what down gives (M, h): its norm's input."""
    tokens = normed.both.size(0)
    inner, h = normed.group.forward(normed.both, tokens >= HOLD * normed.group.inputs), down.input_buffer(tokens)
    gate, up = inner.chunk(2, 1)
    glu_forward(gate, up, parts.activation, parts.impl, h[:, : down.inputs])
    return inner, down.forward(h, None)


def _before_norm(to_u: Tensor, of_o: Tensor | None, parts: LayerParts, onto: LoraOnto) -> Tensor:
    """A buffer of `onto` with the gradient of what o gave (M, h), from one with du: that one, where no norm follows."""
    if parts.after is None or of_o is None:
        return to_u
    out = onto.buffer(to_u.size(0))
    gradient_of_made(to_u[:, : onto.outputs], of_o, parts.after[0], out[:, : onto.outputs], parts.impl)
    return out


def _inner_backward(
    normed: _Normed,
    down: LoraOnto,
    upstream: Tensor,
    parts: LayerParts,
    inner: Tensor | None,
    gradients: list[Adapters],
) -> Tensor:
    """`tiled_backward`, in tiles or with gate and up all at once: made here, or kept (`inner`)."""
    if inner is None and len(tiles_of(parts, upstream)) > 1:
        return tiled_backward(normed.group, normed.both, down, upstream, parts, gradients)
    if inner is None:
        inner = normed.group.forward(normed.both, upstream.size(0) >= HOLD * normed.group.inputs)
    else:
        normed.group.shrink_into(normed.both)
    h, to_inner = glu_gradients(inner, down.input_gradient(upstream), parts)
    del inner
    down.parameter_gradients(h, down.shrink(h), upstream, gradients[1])
    del h
    to_n, to_xa = normed.group.input_gradient(to_inner)
    normed.group.parameter_gradients(normed.both, to_xa, to_inner, gradients[0])
    return to_n


def _normed(
    x: Tensor,
    norm: Norm,
    group: Sequence[Projection],
    adapters: Adapters,
    parts: LayerParts,
    both: Tensor | None = None,
) -> _Normed:
    """The norm of x (M, h) in a buffer that its projections can work in: `both` (M, h + R), or a new one."""
    projections = LoraGroup(group, adapters, x, parts.impl)
    both = projections.buffer(x.size(0)) if both is None else both
    options = (norm.weight, norm.eps, norm.shift, norm.cast_first)
    return _Normed(projections, both, rms_norm_forward(x, None, *options, parts.impl, both[:, : x.size(1)])[2])


def _onto_residual(
    onto: LoraOnto, rows: Tensor, residual: Tensor, parts: LayerParts, out: Tensor | None = None
) -> tuple[Added, Tensor]:
    """residual + what o makes of rows (M, K), in `out` or new memory, and their x A'^T (M, R), a view into all of the
    GEMM's input."""
    both = onto.input_buffer(rows.size(0))
    copy_rows(both[:, : onto.inputs], rows)
    return add_onto(onto, both, residual, parts.after_o(), parts.impl, out), both[:, onto.inputs :]


def _holds(x: Tensor) -> bool:
    """Whether unpacked weights and adapters are little beside the activations of x (M, h), and stay until needed."""
    return x.size(0) >= HOLD * x.size(1)


def _versions(adapters: Sequence[Tensor | None]) -> list[int]:
    return [t._version for t in adapters if t is not None]


def _norm_backward(
    to_y: Tensor, to_sum: Tensor, x: Tensor, r: Tensor, norm: Norm, parts: LayerParts, out: Tensor | None = None
) -> Tensor:
    options = (norm.weight, norm.shift, norm.cast_first)
    return rms_norm_backward(to_y, to_sum, x, r, *options, impl=parts.impl, out=out)[0]
