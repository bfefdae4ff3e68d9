"""`graphed_layer` for a layer that keeps all: in buffers of its own, where the backward's steps read it.

Attention's inputs are there too, and its graph holds views of them. What remains to be copied is the layer's input,
its output and their gradients: autograd's tensors are elsewhere every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.decoder_layer import _backward, _Kept, _norm_backward, _versions
from slothrl_kernels.kept_steps import ends_apart, gradients_in, norm_into, starts_apart
from slothrl_kernels.layer_attention import Attended, attend_backward, attention, attention_backward
from slothrl_kernels.layer_frame import gives_apart
from slothrl_kernels.layer_own import Own
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.lora_flat import adapters_in, gradient_of_a, views_of_gradients
from slothrl_kernels.recorded_layer import Recorded, addresses


def kept_layer(x: Tensor, parts: LayerParts, recorded: Recorded, save: bool) -> Tensor:
    """`graphed_layer` by a recording with buffers of its own, which nobody has a lease of; arguments as there."""
    return _KeptLayer.apply(x, parts, recorded, save, *parts.adapters())  # pyright: ignore


class _KeptLayer(torch.autograd.Function):
    """(x, parts, recorded, save, A and B of every projection) -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: LayerParts, recorded: Recorded, save: bool, *adapters: Tensor | None
    ) -> Tensor:
        frame, own, follows = recorded.frame, own_of(recorded), any(ctx.needs_input_grad)
        _put_in(x, parts, recorded)
        recorded.before()
        attended = attention(own.turned(x.shape, parts), parts, follows)
        frame.fill("rows", attended.rows)
        recorded.after()
        frame.wrote(recorded.rows, "state")
        own.wrote(recorded.rows, "normed", "u")
        if follows:
            ctx.kept, ctx.lease = attended, own.lend()
            ctx.parts, ctx.recorded, ctx.versions = parts, recorded, _versions(adapters)
            ctx.held = None if save else x
            ctx.save_for_backward(x if save else None)
        return _output(recorded, x.size(0) * x.size(1)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_y: Tensor) -> tuple:
        x = ctx.saved_tensors[0] if ctx.held is None else ctx.held
        attended, lease, parts = ctx.kept, ctx.lease, ctx.parts
        ctx.kept = ctx.lease = None  # they serve once; the lease is over when this returns
        if _versions(parts.adapters()) != ctx.versions:
            raise RuntimeError("an adapter was written to between the forward and its backward")
        to_rows = to_y[0].reshape(-1, x.size(-1))
        with torch.autocast(x.device.type, enabled=False):
            if lease is None:  # a second backward
                to_x, found = _backward(x, to_rows, parts, _Kept())
            elif ctx.recorded.addresses != addresses(parts):  # since the forward: what was kept serves all the same
                to_x, found = _backward(x, to_rows, parts, _kept_in(ctx.recorded, attended, to_rows.size(0)))
            else:
                to_x, found = _replayed(x, to_rows, parts, ctx.recorded, attended)
        return to_x.view(x.shape), None, None, None, *found


def _put_in(x: Tensor, parts: LayerParts, recorded: Recorded) -> None:
    """x (B, S, h) to where the steps take it."""
    frame, own, rows = recorded.frame, own_of(recorded), x.reshape(-1, x.size(-1))
    frame.set_tables(parts.tables, x.shape)
    if not starts_apart(parts, recorded.rows):
        frame.fill("x", rows)
        return
    own.fill("u", rows)  # the residual, which the step adds to
    norm_into(own, "normed", rows, parts.first, parts.impl)
    own.end("normed", rows.size(0))


def _replayed(
    x: Tensor, to_y: Tensor, parts: LayerParts, recorded: Recorded, attended: Attended
) -> tuple[Tensor, list[Tensor | None]]:
    """dx (M, h) and the adapters' gradients, as `decoder_layer`'s backward gives them, as tensors of their own."""
    frame, rows, tokens = recorded.frame, recorded.rows, to_y.size(0)
    shape, apart, x = x.shape, ends_apart(rows), x.reshape(-1, x.size(-1))
    frame.set_tables(parts.tables, shape)
    if not apart:
        frame.fill("x", x)
    frame.fill("to_y" if parts.after is None else "state", to_y)
    recorded.middle()
    of_a = frame.view(("o's A",), lambda: adapters_in(parts.groups, frame.found)[1].a)
    if of_a is not None:
        to_xa = frame.right("to_u" if parts.after is None else "to_o", tokens, shape[-1])
        gradient_of_a([parts.o], of_a, to_xa, attended.rows)
    to_out, to_qkv = frame.rows("to_rows", tokens), gradients_in(frame, tokens, parts)
    if apart:
        attend_backward(to_out, attended, shape, parts, to_qkv)
    else:
        attention_backward(to_out, attended, to_qkv)
    frame.end("to_qkv", tokens)
    recorded.last()
    frame.wrote(rows, "state")
    found = frame.found.to(_dtype_of(parts), copy=True)  # one copy of all: what autograd keeps is nobody else's
    return _input_gradient(recorded, x, parts), views_of_gradients(parts.groups, found)


def _output(recorded: Recorded, tokens: int) -> Tensor:
    """y (M, h) in memory of its own, after `KeptSteps.after`."""
    frame = recorded.frame
    if ends_apart(recorded.rows) and gives_apart(recorded.parts):
        u, product = own_of(recorded).rows("u", tokens), frame.rows("product", tokens)
        return torch.addmm(u, product, frame.view(("joined",), lambda: frame.joined.T))
    return frame.rows("state", tokens).clone()


def _input_gradient(recorded: Recorded, x: Tensor, parts: LayerParts) -> Tensor:
    """dx (M, h) in memory of its own, after `KeptSteps.last`."""
    frame, tokens = recorded.frame, x.size(0)
    if not ends_apart(recorded.rows):
        return frame.rows("state", tokens).clone()
    to_n, to_u = frame.rows("to_n", tokens), frame.left("to_u", *x.shape)
    return _norm_backward(to_n, to_u, x, own_of(recorded).scales[0][:tokens], parts.first, parts)


def _kept_in(recorded: Recorded, attended: Attended, tokens: int) -> _Kept:
    names = ("u", "inner") if recorded.parts.after is None else ("u", "inner", "of_o", "of_down")
    return _Kept(None, attended, *(own_of(recorded).rows(name, tokens) for name in names))


def own_of(recorded: Recorded) -> Own:
    assert recorded.own is not None
    return recorded.own


def _dtype_of(parts: LayerParts) -> torch.dtype:
    """Of the adapters: all are of one dtype where a layer is recorded."""
    return next(t.dtype for t in parts.adapters() if t is not None)
