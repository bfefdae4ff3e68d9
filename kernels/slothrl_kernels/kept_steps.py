"""`LayerSteps` of a decoder layer that keeps all: what the backward needs stays where the forward's steps wrote it.

    before   x -> q, k, v                          and the adapters' values, for all steps
    after    x, attention's output -> y
    middle   dy -> the gradient of attention's output, the one after attention, those of o's B, gate, up and down
    last     the gradients of what the projections gave -> dx, and the gradients of q, k and v's adapters

Their caller computes the gradient of o's A: it takes attention's output, which is where attention put it. And over many
rows (`ends_apart`) what is at the steps' ends, where a copy would cost more than a launch: the first norm (x is then in
the place of u), the output, the gradients of q and k before norms and rotation, dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl_kernels.decoder_layer import _norm_backward
from slothrl_kernels.glu import glu_forward
from slothrl_kernels.layer_attention import heads_of, turn_back
from slothrl_kernels.layer_frame import Frame, gives_apart
from slothrl_kernels.layer_mlp import glu_gradients
from slothrl_kernels.layer_own import Own
from slothrl_kernels.layer_parts import LayerParts, Norm
from slothrl_kernels.layer_residual import add_onto, gradient_of_made
from slothrl_kernels.layer_steps import not_here
from slothrl_kernels.lora_flat import AdapterGradients, adapter_values, adapters_in
from slothrl_kernels.lora_group import LoraGroup
from slothrl_kernels.lora_onto import LoraOnto
from slothrl_kernels.qk_norm_rope import qk_norm_rope_forward
from slothrl_kernels.rms_norm_math import rms_norm_forward
from slothrl_kernels.rope import rope_turn
from slothrl_kernels.switch import Impl

SCALES = {"normed": 0, "normed_mlp": 1}  # which of `Own.scales` is whose
APART = 2048  # rows from which on a pass over them costs more than a launch


class KeptSteps:
    """One layer's steps over `count` rows.

    Args:
        parts: the layer, which keeps all; its attention and tables are not looked at, the frame's tables are.
        frame: of such layers, with at least `count` rows. own: this layer's, likewise.
    """

    def __init__(self, parts: LayerParts, frame: Frame, own: Own, count: int) -> None:
        tables = parts.tables and (frame.rows("cos", count)[None], frame.rows("sin", count)[None])
        self.parts = parts._replace(tables=tables, attend=not_here, keeper=None)
        self.frame, self.own, self.count = frame, own, count
        self.apart = ends_apart(count)
        self.x = frame.rows("x", count)
        self.hidden = self.x.size(1)
        self.shape = torch.Size((1, count, self.hidden))
        self.values = adapters_in(parts.groups, own.values)
        self.gradients = AdapterGradients(parts.groups, self.x, frame.found).found

    def before(self) -> None:
        own, x, parts = self.own, self.x, self.parts
        adapter_values(parts.groups, x, self.own.values)
        if not starts_apart(parts, self.count):
            norm_into(own, "normed", x, parts.first, parts.impl)
        qkv = self._group(0).forward(own.rows("normed", self.count), out=self.own.rows("qkv", self.count))
        q, k, _ = heads_of(qkv, self.shape, parts)
        if parts.norms is not None and parts.tables is not None:
            turned = self.own.turned(self.shape, parts)
            given = (*parts.norms, *parts.tables, parts.norm, parts.impl)
            qk_norm_rope_forward(q, k, *given, (turned.q, turned.k))
        elif parts.tables is not None:
            rope_turn(q, k, *parts.tables, in_place=True, impl=parts.impl)

    def after(self) -> None:
        own, parts, count = self.own, self.parts, self.count
        onto, rows = self._onto(parts.o, 1), self.frame.rows("rows", count)
        u = own.rows("u", count)
        x = u if starts_apart(parts, count) else self.x
        u, of_o = add_onto(onto, rows, x, parts.after_o(), parts.impl, u)
        own.rows("shrunk", count).copy_(rows[:, onto.inputs :])
        norm_into(own, "normed_mlp", u, parts.second, parts.impl)
        down = self._onto(parts.down, 3)
        apart = self.apart and gives_apart(parts)
        both = self.frame.rows("product", count) if apart else down.input_buffer(count)
        gate, up = self._group(2).forward(own.rows("normed_mlp", count), out=own.rows("inner", count)).chunk(2, 1)
        glu_forward(gate, up, parts.activation, parts.impl, both[:, : down.inputs])
        of_down = None
        if apart:
            down.shrink_into(both)
            down.joined(self.frame.joined)
        else:
            of_down = add_onto(down, both, u, parts.after_down(), parts.impl, self.frame.rows("state", count)).made
        own.rows("shrunk_mlp", count).copy_(both[:, down.inputs :])
        if of_o is not None and of_down is not None:
            own.rows("of_o", count).copy_(of_o)
            own.rows("of_down", count).copy_(of_down)

    def middle(self) -> None:
        parts, count, hidden = self.parts, self.count, self.hidden
        to_u = to_o = self.frame.rows("to_u", count)  # [du | du B]
        self._mlp_backward(to_u[:, :hidden])
        if parts.after is not None:
            to_o, of_o = self.frame.rows("to_o", count), self.own.rows("of_o", count)
            gradient_of_made(to_u[:, :hidden], of_o, parts.after[0], to_o[:, :hidden], parts.impl)
        onto, b = self._onto(parts.o, 1), self.gradients[1].b[0]
        onto.expand_into(to_o)
        if b is not None:
            torch.mm(to_o[:, :hidden].T, self.own.rows("shrunk", count)[:, : parts.o.rank], out=b)
        onto.times_weight(to_o, self.frame.rows("to_rows", count))

    def last(self) -> None:
        parts, count, out = self.parts, self.count, None
        if self.apart:
            out = self.frame.rows("to_n", count)
        else:
            raw = None if parts.norms is None else self.own.rows("qkv", count)
            turn_back(gradients_in(self.frame, count, parts), raw, self.shape, parts)
        both, upstream = self.own.rows("normed", count), self.frame.rows("to_qkv", count)
        to_n = self._group(0).backward(both, upstream, self.gradients[0], out)
        if not self.apart:
            to_u, r = self.frame.rows("to_u", self.count)[:, : self.hidden], self.own.scales[0][: self.count]
            _norm_backward(to_n, to_u, self.x, r, parts.first, parts, self.frame.rows("state", self.count))

    def _mlp_backward(self, out: Tensor) -> None:
        """du (M, h) into `out`; over gate and up, which serve once."""
        own, parts, count = self.own, self.parts, self.count
        u, down, upstream = own.rows("u", count), self._onto(parts.down, 3), self.frame.rows("to_y", count)
        to_y = upstream[:, : self.hidden]
        if parts.after is not None:
            to_made, to_y = to_y, self.frame.rows("state", count)
            gradient_of_made(to_y, own.rows("of_down", count), parts.after[1], to_made, parts.impl)
        h, to_inner = glu_gradients(own.rows("inner", count), down.input_gradient(upstream), parts)
        down.parameter_gradients(h, own.rows("shrunk_mlp", count), upstream, self.gradients[3])
        del h
        group = self._group(2)
        to_n, to_xa = group.input_gradient(to_inner)
        group.parameter_gradients(own.rows("normed_mlp", count), to_xa, to_inner, self.gradients[2])
        _norm_backward(to_n, to_y, u, own.scales[1][:count], parts.second, parts, out)

    def _group(self, place: int) -> LoraGroup:
        return LoraGroup(self.parts.groups[place], self.values[place], self.x, self.parts.impl)

    def _onto(self, projection, place: int) -> LoraOnto:
        return LoraOnto(projection, self.values[place], self.x, self.parts.impl)


def ends_apart(rows: int) -> bool:
    """Whether what is at the ends of steps over so many rows is left to their caller."""
    return rows >= APART


def starts_apart(parts: LayerParts, rows: int) -> bool:
    """Whether `before` finds the norm made, and x in the place of u, to which `after` adds: not where o is normed."""
    return ends_apart(rows) and parts.after is None


def gradients_in(frame: Frame, tokens: int, parts: LayerParts) -> Tensor:
    """Where attention's backward writes those of q, k and v beside each other: the left of "to_qkv"."""
    return frame.left("to_qkv", tokens, sum(p.weight.shape[0] for p in parts.qkv))


def norm_into(own: Own, name: str, x: Tensor, norm: Norm, impl: Impl) -> None:
    """The norm of x (M, h) into the left of "normed" or "normed_mlp", and its r among the scales."""
    options = (norm.weight, norm.eps, norm.shift, norm.cast_first)
    r = rms_norm_forward(x, None, *options, impl, own.left(name, *x.shape))[2]
    own.scales[SCALES[name]][: x.size(0)].copy_(r)
