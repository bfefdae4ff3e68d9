"""`decoder_layer` with its steps recorded: a few launches of the host a layer, whatever the GPU has to do.

Same arguments, same results, and what is kept is kept as there. The number of tokens is rounded up to that of the
recording with rows of zeros (`Frame`); sequences, masks and packs are attention's business, which is not recorded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.decoder_layer import _backward, _Kept, _versions
from slothrl_kernels.layer_attention import attention, attention_backward, kept_of
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.layer_recorder import Recorder, Replay
from slothrl_kernels.layer_steps import LayerSteps, turned_in
from slothrl_kernels.lora_flat import views_of_gradients

KEPT = ("u", "inner", "of_o", "of_down")  # of a frame and of `_Kept`: what a layer that keeps all gives away
GRAIN = 16  # the fewest rows two buckets are apart, and into how many an octave is divided


class Recorded(NamedTuple):
    """One layer's steps at one number of rows, recorded.

    parts: what they were recorded for, held because a recording reads it; addresses: where it was then.
    """

    frame: Frame
    rows: int
    parts: LayerParts
    addresses: tuple
    before: Replay
    after: Replay
    middle: Replay
    last: Replay

    @property
    def whole(self) -> bool:
        """Whether its backward takes u, gate and up as the forward kept them; else it computes them again."""
        return self.parts.keep == "all"


def bucket(tokens: int) -> int:
    """The number of rows that `tokens` are rounded up to: the next multiple of at most a 16th of them, and of 16."""
    grain = max(GRAIN, 1 << max(0, (tokens // GRAIN).bit_length() - 1))
    return -(-tokens // grain) * grain


def addresses(parts: LayerParts) -> tuple:
    """Where a layer's weights and adapters are in memory, with its scalings: a recording reads them there."""
    found: list[Any] = [weight.data_ptr() for weight in parts.norm_weights()]
    for p in parts.projections:
        weight = p.weight.data_ptr() if isinstance(p.weight, Tensor) else id(p.weight)  # held by the recording
        found += [weight, *(None if t is None else t.data_ptr() for t in (p.bias, p.a, p.b)), p.scaling]
    return tuple(found)


def record_layer(parts: LayerParts, frame: Frame, rows: int, recorder: Recorder) -> Recorded:
    """Record a layer over `rows` rows of a frame, whose contents are lost.

    Raises: whatever a step or the recorder raises; ValueError for parts that `decoder_layer` would not take.
    """
    parts.check(frame.rows("x", rows)[None])
    steps = LayerSteps(parts, frame, rows)
    with torch.no_grad(), torch.autocast(frame.found.device.type, enabled=False):
        made = [recorder.record(step) for step in (steps.before, steps.after, steps.middle, steps.last)]
    frame.clear()
    return Recorded(frame, rows, steps.parts, addresses(parts), *made)


def graphed_layer(x: Tensor, parts: LayerParts, recorded: Recorded, save: bool = True) -> Tensor:
    """`decoder_layer` by a recording of these parts.

    Args:
        x: (B, S, h), at most recorded.rows tokens. parts, save: as `decoder_layer` takes them.
        recorded: of parts with the same `addresses`, which keep all where these do.

    Returns:
        (B, S, h) of x's dtype.

    Raises:
        ValueError: another layer's recording, or more tokens than it has rows.
    """
    if x.size(0) * x.size(1) > recorded.rows or (parts.keep == "all" and not recorded.whole):
        kept = f"{parts.keep!r} for one of {recorded.parts.keep!r}"
        raise ValueError(f"{tuple(x.shape)} for a recording of {recorded.rows} tokens, {kept}")
    with torch.autocast(x.device.type, enabled=False):
        return _GraphedLayer.apply(x, parts, recorded, save, *parts.adapters())  # pyright: ignore


class _GraphedLayer(torch.autograd.Function):
    """(x, parts, recorded, save, A and B of every projection) -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: LayerParts, recorded: Recorded, save: bool, *adapters: Tensor | None
    ) -> Tensor:
        frame, rows, follows = recorded.frame, recorded.rows, any(ctx.needs_input_grad)
        tokens, keep = x.size(0) * x.size(1), parts.keep if follows else "input"
        _put_in(frame, x, parts)
        recorded.before()
        frame.wrote(rows, "qkv", "turned")
        attended = attention(turned_in(frame, x.shape, parts, keep != "input"), parts, keep != "input")
        frame.fill("rows", attended.rows)
        recorded.after()
        frame.wrote(rows, "state", *KEPT)
        if follows:
            names = KEPT[: 2 if parts.after is None else 4] if keep == "all" else ()
            kept = [frame.rows(name, tokens).clone() for name in names]
            ctx.kept = _Kept(None, kept_of(attended, parts), *kept)
            ctx.parts = parts._replace(keeper=None)  # it serves once: a second backward keeps nothing
            ctx.recorded, ctx.versions = recorded, _versions(adapters)
            ctx.held = None if save else x
            ctx.save_for_backward(x if save else None)
        return frame.rows("state", tokens).clone().view(x.shape)

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
            if moved or (ctx.recorded.whole and kept.u is None):  # a second backward
                to_x, found = _backward(x, to_rows, parts, kept)
            else:
                to_x, found = _replayed(x, to_rows, parts, ctx.recorded, kept)
        return to_x.view(x.shape), None, None, None, *found


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
    given = zip(KEPT, (kept.u, kept.inner, kept.of_o, kept.of_down), strict=True)
    for name, source in (("rows", attended.rows), ("state", to_y), *given):
        if source is not None:
            frame.fill(name, source)
    recorded.middle()
    frame.wrote(rows, "rows", "to_u", "inner")
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
