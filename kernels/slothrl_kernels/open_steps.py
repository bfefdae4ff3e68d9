"""`LayerSteps` of a large layer that keeps less than all, with open ends: what reads or writes autograd's own tensors,
or what is kept, is its caller's (`open_layer`), so that nothing is copied for being somewhere else at every call.

    before   the adapters' values, for all steps and the caller; the weights of q, k and v and of o, unpacked
    after    norm(u) -> what goes into down; its weight, unpacked
    middle   u, [dy | …] -> [du | du B], the gradient of attention's output, those of o's B, gate, up and down
    last     norm(x), the gradients of what q, k and v's projections gave -> that of norm(x), those of their adapters
"""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl_kernels.decoder_layer import _inner_backward, _norm_backward, _normed
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_mlp import product
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.layer_steps import not_here
from slothrl_kernels.lora_flat import AdapterGradients, adapter_values, adapters_in
from slothrl_kernels.lora_group import LoraGroup
from slothrl_kernels.lora_onto import LoraOnto


class OpenSteps:
    """One layer's steps over `count` rows of a frame.

    Args:
        parts: the layer, without norms of what o and down give; its attention and tables are not looked at.
        frame: an open one, with at least `count` rows.
    """

    def __init__(self, parts: LayerParts, frame: Frame, count: int) -> None:
        self.parts = parts._replace(tables=None, attend=not_here, keeper=None)
        self.frame, self.count = frame, count
        self.u = frame.rows("u", count)
        self.values = adapters_in(parts.groups, frame.values)
        self.gradients = AdapterGradients(parts.groups, self.u, frame.found).found

    def rows(self, name: str) -> Tensor:
        return self.frame.rows(name, self.count)

    def before(self) -> None:
        adapter_values(self.parts.groups, self.u, self.frame.values)
        weights = self.frame.weights
        if "qkv" in weights:
            self._group(0).unpacked(weights["qkv"])
        if "o" in weights:
            self._onto(1).joined(weights["o"])

    def after(self) -> None:
        parts = self.parts
        down = self._onto(3)
        product(self._group(2), self.rows("normed_mlp"), down, parts, kept=False, out=self.rows("product"))
        if "down" in self.frame.weights:
            down.joined(self.frame.weights["down"])

    def middle(self) -> None:
        parts, u, upstream, to_u = self.parts, self.u, self.rows("to_y"), self.rows("to_u")
        hidden = u.size(1)
        normed = _normed(u, parts.second, parts.inner, self.values[2], parts)
        to_n = _inner_backward(normed, self._onto(3), upstream, parts, None, self.gradients[2:])
        _norm_backward(to_n, upstream[:, :hidden], u, normed.r, parts.second, parts, to_u[:, :hidden])
        del to_n, normed
        onto, b = self._onto(1), self.gradients[1].b[0]
        onto.expand_into(to_u)
        if b is not None:
            torch.mm(to_u[:, :hidden].T, self.rows("shrunk")[:, : parts.o.rank], out=b)
        onto.times_weight(to_u, self.rows("to_rows"))

    def last(self) -> None:
        both = self.rows("normed")
        group = self._group(0).held(self.frame.weights.get("qkv"))  # from `before`: a backward has no "down" there
        group.shrink_into(both)
        group.backward(both, self.rows("to_qkv"), self.gradients[0], self.rows("to_n"))

    def _group(self, place: int) -> LoraGroup:
        return LoraGroup(self.parts.groups[place], self.values[place], self.u, self.parts.impl)

    def _onto(self, place: int) -> LoraOnto:
        return LoraOnto(self.parts.groups[place][0], self.values[place], self.u, self.parts.impl)
