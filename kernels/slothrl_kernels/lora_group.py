"""Projections with LoRA inside a larger step: into and out of buffers that the caller owns, without autograd.

M tokens, K inputs, N the sum of the outputs N_i, R the sum of the ranks rounded up to 8. `lora_math`'s layouts, with
nothing copied to put things side by side: whatever writes x or dy writes it into the left columns of a wider buffer.

    Several on one input    [x | x A'^T] [W_i | B_i]^T = every y_i beside each other, one GEMM; dx is either
                            [every dy_i | every dy_i B_i] [W_i ; A'], where whoever makes dy leaves room for that, or
                            [dx, lacking a part (R, K) | every dy_i B_i] comes from the first matrix

A packed W_i is unpacked next to its neighbours in one buffer; dense weights are multiplied where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from slothrl_kernels.base_weight import dense
from slothrl_kernels.lora_flat import Adapters, gradient_of_a, spans_of
from slothrl_kernels.lora_math import Projection
from slothrl_kernels.lora_pass import lora_pass
from slothrl_kernels.nf4_group import Part, unpack_group
from slothrl_kernels.switch import Impl


class LoraGroup:
    """Projections of one input, in one pass over some tokens.

    Args:
        projections: of K inputs each; weights dense or packed.
        adapters: A' and B of them, in the computation's dtype.
        like: any tensor of the computation's dtype and device.
        impl: of the nf4 kernels.
    """

    def __init__(self, projections: Sequence[Projection], adapters: Adapters, like: Tensor, impl: Impl) -> None:
        self.projections, self.like = projections, like
        self.impl: Impl = impl
        self.inputs = projections[0].weight.shape[1]
        self.rows = _slices(p.weight.shape[0] for p in projections)
        self.spans = spans_of(projections)
        self.a, self.b = adapters
        self.rank = 0 if self.a is None else self.a.size(0)
        self._whole: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.rows[-1].stop

    def buffer(self, tokens: int) -> Tensor:
        """Memory for [x | x A'^T] (M, K + R)."""
        return self.like.new_empty(tokens, self.inputs + self.rank)

    def forward(self, both: Tensor, hold: bool = False, out: Tensor | None = None) -> Tensor:
        """Every y_i beside the others (M, N), of both (M, K + R), whose right columns are written here.

        Args:
            hold: keep the unpacked weights for the backward.
            out: where they go, instead of new memory.
        """
        self.shrink_into(both)
        y = both.new_empty(both.size(0), self.outputs) if out is None else out
        if not self._packed:
            return self._forward_dense(both, y)
        whole = self._unpacked() if self._whole is None else self._whole
        weights = whole[: self.outputs]
        if (bias := self.bias()) is None:
            torch.mm(both, weights.T, out=y)
        else:
            torch.addmm(bias, both, weights.T, out=y)
        self._whole = whole if hold else None
        return y

    def held(self, whole: Tensor | None) -> LoraGroup:
        """Itself, with what `unpacked` gave, if anything, for one `forward`, `backward` or `input_gradient`."""
        self._whole = whole
        return self

    def unpacked(self, out: Tensor) -> Tensor:
        """[W_i | B_i at its own columns of R] of packed W_i, in `out` (N + R, K + R) above R rows for A'."""
        pieces = zip(self.projections, self.b, self.spans, strict=True)
        parts = [Part(p.weight, b, span.start) for p, b, span in pieces]
        unpack_group(parts, out[: self.outputs], impl=self.impl)
        return out

    def shrink_into(self, both: Tensor) -> None:
        """x A'^T into the right columns of both (M, K + R)."""
        if self.a is not None:
            torch.mm(both[:, : self.inputs], self.a.T, out=both[:, self.inputs :])

    def input_gradient(self, to_y: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """dx (M, K) and every dy_i B_i (M, R) from all dy_i beside each other (M, N).

        Args:
            out: (M, K + R), whose left columns take dx, instead of new memory.
        """
        if not self._packed:
            to_x, to_xa = self._input_gradient_dense(to_y)
            return to_x if out is None else out[:, : self.inputs].copy_(to_x), to_xa
        whole, self._whole = self._whole, None
        wide = to_y.new_empty(to_y.size(0), self.inputs + self.rank) if out is None else out
        torch.mm(to_y, (self._unpacked() if whole is None else whole)[: self.outputs], out=wide)
        if self.a is None:
            return wide, None
        to_xa = wide[:, self.inputs :]
        return wide[:, : self.inputs].addmm_(to_xa, self.a), to_xa

    def parameter_gradients(self, both: Tensor, to_xa: Tensor | None, to_y: Tensor, out: Adapters) -> None:
        """dA and dB into `out`."""
        if to_xa is None or out.a is None:
            return
        gradient_of_a(self.projections, out.a, to_xa, both[:, : self.inputs])
        for b, rows, span in zip(out.b, self.rows, self.spans, strict=True):
            if b is not None:
                xa = both[:, self.inputs + span.start : self.inputs + span.stop]
                torch.mm(to_y[:, rows].T, xa, out=b)

    def upstream(self, tokens: int) -> Tensor:
        """Memory for [every dy_i | every dy_i B_i] (M, N + R)."""
        return self.like.new_empty(tokens, self.outputs + self.rank)

    def backward(self, both: Tensor, upstream: Tensor, gradients: Adapters, out: Tensor | None = None) -> Tensor:
        """dx (M, K), and dA and dB into `gradients`, of upstream (M, N + R), whose right columns are written here.

        Args:
            both: as `forward` left it.
            out: where dx goes, instead of new memory.
        """
        to_y, to_xa = upstream[:, : self.outputs], upstream[:, self.outputs :]
        if self.rank:
            self._adapter_gradients(both, to_y, to_xa, gradients)
        if self._packed:
            to_x = upstream.new_empty(len(upstream), self.inputs) if out is None else out
            return torch.mm(upstream, self._below(), out=to_x)
        to_x = None
        for p, rows in zip(self.projections, self.rows, strict=True):
            weight = dense(p.weight, to_y.dtype)
            to_x = torch.mm(to_y[:, rows], weight, out=out) if to_x is None else to_x.addmm_(to_y[:, rows], weight)
        assert to_x is not None
        return to_x if self.a is None else to_x.addmm_(to_xa, self.a)

    def _adapter_gradients(self, both: Tensor, to_y: Tensor, to_xa: Tensor, out: Adapters) -> None:
        """dA and dB into `out`, every dy_i B_i into to_xa (M, R)."""
        used = self.spans[-1].stop
        if used < self.rank:
            to_xa[:, used:].zero_()
        xa, inputs = both[:, self.inputs :], both[:, : self.inputs]
        lora_pass(to_y, xa, [n.stop - n.start for n in self.rows], self.b, to_xa, out.b, self.impl)
        assert out.a is not None
        gradient_of_a(self.projections, out.a, to_xa, inputs)

    def _below(self) -> Tensor:
        """[W_i ; A'] (N + R, K)."""
        whole, self._whole = self._whole, None
        if whole is None:
            whole = self.like.new_empty(self.outputs + self.rank, self.inputs)
            unpack_group([Part(p.weight) for p in self.projections], whole[: self.outputs], impl=self.impl)
        below = whole[:, : self.inputs]
        if self.a is not None:
            below[self.outputs :] = self.a
        return below

    @property
    def _packed(self) -> bool:
        return not any(isinstance(p.weight, Tensor) for p in self.projections)

    def bias(self) -> Tensor | None:
        """All biases beside each other (N,), zeros for those that have none."""
        if all(p.bias is None for p in self.projections):
            return None
        parts = [
            self.like.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias.detach().to(self.like.dtype)
            for p in self.projections
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _unpacked(self) -> Tensor:
        return self.unpacked(self.like.new_empty(self.outputs + self.rank, self.inputs + self.rank))

    def _forward_dense(self, both: Tensor, y: Tensor) -> Tensor:
        x = both[:, : self.inputs]
        for p, b, rows, span in zip(self.projections, self.b, self.rows, self.spans, strict=True):
            weight = dense(p.weight, both.dtype)
            if p.bias is None:
                torch.mm(x, weight.T, out=y[:, rows])
            else:
                torch.addmm(p.bias.detach().to(both.dtype), x, weight.T, out=y[:, rows])
            if b is not None:
                xa = both[:, self.inputs + span.start : self.inputs + span.stop]
                y[:, rows].addmm_(xa, b.T)
        return y

    def _input_gradient_dense(self, to_y: Tensor) -> tuple[Tensor, Tensor | None]:
        to_x, to_xa = None, None if self.a is None else to_y.new_zeros(to_y.size(0), self.rank)
        for p, b, rows, span in zip(self.projections, self.b, self.rows, self.spans, strict=True):
            weight = dense(p.weight, to_y.dtype)
            to_x = to_y[:, rows] @ weight if to_x is None else to_x.addmm_(to_y[:, rows], weight)
            if b is not None and to_xa is not None:
                torch.mm(to_y[:, rows], b, out=to_xa[:, span])
        assert to_x is not None
        return to_x if to_xa is None or self.a is None else to_x.addmm_(to_xa, self.a), to_xa


def _slices(sizes) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise([0, *accumulate(sizes)])]
