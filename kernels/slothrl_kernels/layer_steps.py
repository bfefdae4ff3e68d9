"""The steps of a decoder layer between which attention runs: from a `Frame` into it, over a fixed number of rows.

    before   x -> q, k, v                          forward, and again in the backward
    after    x, attention's output -> y
    middle   x, attention's output, dy -> its gradient, the gradient after attention, those of o, gate, up and down
    last     x, the gradients of q, k, v -> dx, and the gradients of q, k and v's adapters

They are `decoder_layer`'s own computation, cut at attention, whose shapes follow the sequences; a step follows the
number of tokens alone, so it can be recorded once. Nothing of a step outlives it but what it copies into the frame.
Layers that keep all have steps of their own (`kept_steps`), and so have large ones that keep less (`open_steps`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl_kernels.decoder_layer import _before_norm, _mlp_backward, _norm_backward, _normed, _onto_residual
from slothrl_kernels.layer_attention import Turned, heads_of, turn, turn_back
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_mlp import product
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.layer_residual import add_onto
from slothrl_kernels.lora_flat import AdapterGradients, adapter_values
from slothrl_kernels.lora_onto import LoraOnto
from slothrl_kernels.row_copy import copy_rows


class LayerSteps:
    """One layer's steps over `count` rows of a frame.

    Args:
        parts: the layer; its attention and tables are not looked at, the frame's tables are.
        frame: with at least `count` rows.
    """

    def __init__(self, parts: LayerParts, frame: Frame, count: int) -> None:
        tables = parts.tables and (frame.rows("cos", count)[None], frame.rows("sin", count)[None])
        self.parts = parts._replace(tables=tables, attend=not_here, keeper=None)
        self.frame, self.count = frame, count
        self.shape = torch.Size((1, count, frame.rows("x", count).size(1)))

    def rows(self, name: str) -> Tensor:
        return self.frame.rows(name, self.count)

    def before(self) -> None:
        x, parts = self.rows("x"), self.parts
        normed = _normed(x, parts.first, parts.qkv, adapter_values([parts.qkv], x)[0], parts)
        qkv = normed.group.forward(normed.both, out=self.rows("qkv"))
        turn(qkv, self.shape, parts, None if parts.norms is None else self.rows("turned"))

    def after(self) -> None:
        x, parts = self.rows("x"), self.parts
        values = adapter_values(parts.groups[1:], x)
        (u, _), _ = _onto_residual(LoraOnto(parts.o, values[0], x, parts.impl), self.rows("rows"), x, parts)
        normed = _normed(u, parts.second, parts.inner, values[1], parts)
        down = LoraOnto(parts.down, values[2], x, parts.impl)
        both, _ = product(normed.group, normed.both, down, parts, kept=False)
        del normed
        add_onto(down, both, u, parts.after_down(), parts.impl, self.rows("state"))

    def middle(self) -> None:
        x, parts, rows = self.rows("x"), self.parts, self.rows("rows")
        values = adapter_values(parts.groups[1:], x)
        gradients = AdapterGradients(parts.groups[1:], x)
        onto = LoraOnto(parts.o, values[0], x, parts.impl)
        (u, of_o), shrunk = _onto_residual(onto, rows, x, parts)
        to_u = _mlp_backward(u, self.rows("state"), parts, values[1:], (None, None), onto, gradients.found[1:])
        del u
        to_o = _before_norm(to_u, of_o, parts, onto)  # [do | do B]
        onto.expand_into(to_o)
        onto.parameter_gradients(rows, shrunk.contiguous(), to_o, gradients.found[0])
        onto.times_weight(to_o, rows)  # over attention's output
        self.rows("to_u").copy_(to_u[:, : x.size(1)])
        self.frame.found[self.frame.first :].copy_(gradients.flat)

    def last(self) -> None:
        x, parts = self.rows("x"), self.parts
        to_qkv, raw = self.rows("qkv"), None
        if parts.norms is not None:
            to_qkv, raw = self.rows("turned"), to_qkv
        turn_back(to_qkv, raw, self.shape, parts)
        gradients = AdapterGradients(parts.groups[:1], x)
        normed = _normed(x, parts.first, parts.qkv, adapter_values([parts.qkv], x)[0], parts)
        normed.group.shrink_into(normed.both)
        upstream = normed.group.upstream(self.count)
        copy_rows(upstream[:, : normed.group.outputs], to_qkv)
        to_n = normed.group.backward(normed.both, upstream, gradients.found[0])
        del upstream
        _norm_backward(to_n, self.rows("to_u"), x, normed.r, parts.first, parts, self.rows("state"))
        self.frame.found[: self.frame.first].copy_(gradients.flat)


def turned_in(frame: Frame, shape: torch.Size, parts: LayerParts, copied: bool) -> Turned:
    """What `before` left of the tokens of (B, S, h); copied, where it is to outlive the layer's turn."""
    tokens = shape[0] * shape[1]
    qkv, over = frame.rows("qkv", tokens), None
    if parts.norms is not None:
        over = frame.rows("turned", tokens)[:, : (parts.heads + parts.kv_heads) * parts.width]
    if not copied:
        key = "heads", *shape[:2], parts.heads, parts.kv_heads, parts.width  # another layer's may be others of one size
        return frame.view(key, lambda: heads_in(qkv, over, shape, parts))
    return heads_in(qkv.clone(), None if over is None else over.contiguous(), shape, parts)


def heads_in(qkv: Tensor, over: Tensor | None, shape: torch.Size, parts: LayerParts) -> Turned:
    """Views of q, k and v (M, N), or of the normed q and k (M, N') with the raw q, k and v beside them."""
    q, k, v = heads_of(qkv, shape, parts)
    if over is None:
        return Turned(None, q, k, v)
    heads = over.view(shape[0], shape[1], -1, parts.width).split([parts.heads, parts.kv_heads], 2)
    return Turned(qkv, heads[0].transpose(1, 2), heads[1].transpose(1, 2), v)


def not_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("attention is between a layer's steps and not in one")
