"""`decoder_layer` with its steps recorded: a few launches of the host a layer, whatever the GPU has to do.

Same arguments, same results, and what is kept is kept as there. The number of tokens is rounded up to that of the
recording with rows of zeros (`Frame`); sequences, masks and packs are attention's business, which is not recorded.
Layers that keep all are in `kept_layer`, the ends of large ones that keep less in `open_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.decoder_layer import _backward, _Kept, _versions, decoder_layer
from slothrl_kernels.kept_layer import kept_layer
from slothrl_kernels.layer_attention import Attended, Parked, attention, attention_backward, kept_of
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_parts import Keep, LayerParts
from slothrl_kernels.layer_steps import turned_in
from slothrl_kernels.lora_flat import views_of_gradients
from slothrl_kernels.open_layer import open_backward, open_forward
from slothrl_kernels.recorded_layer import Recorded, addresses


def graphed_layer(x: Tensor, parts: LayerParts, recorded: Recorded, save: bool = True) -> Tensor:
    """`decoder_layer` by a recording of these parts.

    Args:
        x: (B, S, h), at most recorded.rows tokens. parts, save: as `decoder_layer` takes them.
        recorded: of parts with the same `addresses`, which keep all where these do. Where they do, and the layer's own
            buffers are in use or these do not, `decoder_layer` itself computes what a backward is to follow.

    Returns:
        (B, S, h) of x's dtype.

    Raises:
        ValueError: another layer's recording, or more tokens than it has rows.
    """
    if x.size(0) * x.size(1) > recorded.rows or (parts.keep == "all" and not recorded.whole):
        kept = f"{parts.keep!r} for one of {recorded.parts.keep!r}"
        raise ValueError(f"{tuple(x.shape)} for a recording of {recorded.rows} tokens, {kept}")
    if recorded.own is not None and (recorded.own.taken or (parts.keep != "all" and torch.is_grad_enabled())):
        return decoder_layer(x, parts, save)
    with torch.autocast(x.device.type, enabled=False):
        if recorded.own is not None:
            return kept_layer(x, parts, recorded, save)
        return _GraphedLayer.apply(x, parts, recorded, save, *parts.adapters())  # pyright: ignore


class _GraphedLayer(torch.autograd.Function):
    """(x, parts, recorded, save, A and B of every projection) -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: LayerParts, recorded: Recorded, save: bool, *adapters: Tensor | None
    ) -> Tensor:
        follows = any(ctx.needs_input_grad)
        keep = parts.keep if follows else "input"
        y, kept = (open_forward if recorded.frame.open else _played)(x, parts, recorded, keep)
        if follows:
            ctx.kept = _Kept(None, kept)
            ctx.parts = parts._replace(keeper=None)  # it serves once: a second backward keeps nothing
            ctx.recorded, ctx.versions = recorded, _versions(adapters)
            ctx.held = None if save else x
            ctx.save_for_backward(x if save else None)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_y: Tensor) -> tuple:
        x = ctx.saved_tensors[0] if ctx.held is None else ctx.held
        kept, ctx.kept, parts = ctx.kept, _Kept(), ctx.parts
        if _versions(parts.adapters()) != ctx.versions:
            raise RuntimeError("an adapter was written to between the forward and its backward")
        to_rows = to_y[0].reshape(-1, x.size(-1))
        moved = ctx.recorded.addresses != addresses(parts)  # since the forward: what was kept serves all the same
        with torch.autocast(x.device.type, enabled=False):
            if moved:
                to_x, found = _backward(x, to_rows, parts, kept)
            else:
                backward = open_backward if ctx.recorded.frame.open else _replayed
                to_x, found = backward(x, to_rows, parts, ctx.recorded, kept)
        return to_x.view(x.shape), None, None, None, *found


def _played(x: Tensor, parts: LayerParts, recorded: Recorded, keep: Keep) -> tuple[Tensor, Attended | Parked | None]:
    """y (M, h), as a tensor of its own, and what `keep` says of attention for a backward."""
    frame, rows = recorded.frame, recorded.rows
    _put_in(frame, x, parts)
    recorded.before()
    frame.wrote(rows, "qkv", "turned")
    attended = attention(turned_in(frame, x.shape, parts, keep != "input"), parts, keep != "input")
    frame.fill("rows", attended.rows)
    kept = None if keep == "input" else kept_of(attended, parts)
    recorded.after()
    frame.wrote(rows, "state")
    return frame.rows("state", x.size(0) * x.size(1)).clone(), kept


def _replayed(
    x: Tensor, to_y: Tensor, parts: LayerParts, recorded: Recorded, kept: _Kept
) -> tuple[Tensor, list[Tensor | None]]:
    """dx (M, h) and the adapters' gradients, as `decoder_layer`'s backward gives them, as tensors of their own."""
    frame, rows, tokens = recorded.frame, recorded.rows, x.size(0) * x.size(1)
    _put_in(frame, x, parts)
    if kept.attended is None:
        recorded.before()
        frame.wrote(rows, "qkv", "turned")
        attended = attention(turned_in(frame, x.shape, parts, copied=False), parts, watched=True)
    else:
        attended = kept.attended
    frame.fill("rows", attended.rows)
    frame.fill("state", to_y)
    recorded.middle()
    frame.wrote(rows, "rows", "to_u")
    if parts.norms is not None and kept.attended is not None and attended.raw is not None:
        frame.fill("qkv", attended.raw)
    target = "qkv" if parts.norms is None else "turned"
    attention_backward(frame.rows("rows", tokens), attended, frame.rows(target, tokens))
    frame.end(target, tokens)
    recorded.last()
    frame.wrote(rows, "state", "qkv", "turned")
    found = frame.found.clone()  # one copy of all: what autograd keeps is nobody else's
    return frame.rows("state", tokens).clone(), views_of_gradients(parts.groups, found)


def _put_in(frame: Frame, x: Tensor, parts: LayerParts) -> None:
    frame.fill("x", x.reshape(-1, x.size(-1)))
    frame.set_tables(parts.tables, x.shape)
