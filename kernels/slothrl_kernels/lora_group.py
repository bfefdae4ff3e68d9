"""Projections with LoRA inside a larger step: into and out of buffers that the caller owns, without autograd.

M tokens, K inputs, N the sum of the outputs N_i, R the sum of the ranks rounded up to 8. `lora_math`'s layouts, with
nothing copied to put things side by side: whatever writes x or dy writes it into the left columns of a wider buffer.

    Several on one input    [x | x A'^T] [W_i | B_i]^T = every y_i beside each other, one GEMM; all dy_i beside each
                            other times the same matrix is [dx, lacking a part (R, K) | every dy_i B_i]
    One onto a residual     residual + [x | x A'^T] [W | B]^T; [dy | dy B] [W ; A'] is dx

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
            hold: keep the unpacked weights for `input_gradient`.
            out: where they go, instead of new memory.
        """
        self.shrink_into(both)
        y = both.new_empty(both.size(0), self.outputs) if out is None else out
        if not self._packed:
            return self._forward_dense(both, y)
        whole = self._unpacked() if self._whole is None else self._whole
        if (bias := self.bias()) is None:
            torch.mm(both, whole.T, out=y)
        else:
            torch.addmm(bias, both, whole.T, out=y)
        self._whole = whole if hold else None
        return y

    def held(self, whole: Tensor | None) -> LoraGroup:
        """Itself, with what `unpacked` gave, if anything, for one `forward` or `input_gradient`."""
        self._whole = whole
        return self

    def unpacked(self, out: Tensor) -> Tensor:
        """[W_i | B_i at its own columns of R] (N, K + R) of packed W_i, in `out`."""
        pieces = zip(self.projections, self.b, self.spans, strict=True)
        return unpack_group([Part(p.weight, b, span.start) for p, b, span in pieces], out, impl=self.impl)

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
        torch.mm(to_y, self._unpacked() if whole is None else whole, out=wide)
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
        return self.unpacked(self.like.new_empty(self.outputs, self.inputs + self.rank))

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


class LoraOnto:
    """One projection, K -> N, whose result is added to a residual, or is to be. Arguments as of `LoraGroup`."""

    def __init__(self, projection: Projection, adapters: Adapters, like: Tensor, impl: Impl) -> None:
        self.projection, self.like = projection, like
        self.impl: Impl = impl
        self.outputs, self.inputs = projection.weight.shape
        self.a, self.b = adapters.a, adapters.b[0]
        self.rank = 0 if self.a is None else self.a.size(0)
        self._whole: Tensor | None = None

    def held(self, whole: Tensor | None) -> LoraOnto:
        """Itself, with what `joined` gave, if anything, for `forward`."""
        self._whole = whole
        return self

    def input_buffer(self, tokens: int) -> Tensor:
        """Memory for [x | x A'^T] (M, K + R)."""
        return self.like.new_empty(tokens, self.inputs + self.rank)

    def forward(self, both: Tensor, residual: Tensor | None, out: Tensor | None = None) -> Tensor:
        """residual + y, or y alone (M, N), into `out`, which may be the residual, or a new tensor; of both (M, K + R),
        whose right columns are written here.

        One GEMM, and one rounding in the residual's size: a second would show in the stream of all layers.
        """
        p, inputs = self.projection, self.inputs
        x, xa = both[:, :inputs], both[:, inputs:]
        self.shrink_into(both)
        if isinstance(p.weight, Tensor):
            y = x @ dense(p.weight, both.dtype).T
            if self.b is not None:
                y.addmm_(xa[:, : p.rank], self.b.T)
            y = y if p.bias is None else y.add_(p.bias.detach())
            if residual is not None:
                return torch.add(y, residual, out=y if out is None else out)
            return y if out is None else out.copy_(y)
        whole = self.joined() if self._whole is None else self._whole
        y = both.new_empty(both.size(0), self.outputs) if out is None else out
        torch.mm(both, whole.T, out=y) if residual is None else torch.addmm(residual, both, whole.T, out=y)
        return y if p.bias is None else y.add_(p.bias.detach())

    def shrink_into(self, both: Tensor) -> None:
        """x A'^T into the right columns of both (M, K + R)."""
        if self.a is not None:
            torch.mm(both[:, : self.inputs], self.a.T, out=both[:, self.inputs :])

    def joined(self, out: Tensor | None = None) -> Tensor:
        """[W | B] (N, K + R) of a packed W, in `out` or new memory."""
        whole = self.like.new_empty(self.outputs, self.inputs + self.rank) if out is None else out
        return unpack_group([Part(self.projection.weight, self.b)], whole, impl=self.impl)

    def shrink(self, x: Tensor) -> Tensor | None:
        """x A'^T (M, R)."""
        return None if self.a is None else x @ self.a.T

    def buffer(self, tokens: int) -> Tensor:
        """Memory for [dy | dy B] (M, N + R)."""
        return self.like.new_empty(tokens, self.outputs + self.rank)

    def input_gradient(self, both: Tensor, out: Tensor | None = None) -> Tensor:
        """dx (M, K), into `out` or a new tensor, of both (M, N + R), whose right columns are written here."""
        self.expand_into(both)
        return self.times_weight(both, both.new_empty(both.size(0), self.inputs) if out is None else out)

    def times_weight(self, both: Tensor, out: Tensor) -> Tensor:
        """[dy | dy B] [W ; A'] (M, K) into `out`."""
        if not isinstance(self.projection.weight, Tensor):
            return torch.mm(both, self.unpacked(slice(0, self.inputs)), out=out)
        torch.mm(both[:, : self.outputs], dense(self.projection.weight, both.dtype), out=out)
        return out if self.a is None else out.addmm_(both[:, self.outputs :], self.a)

    def expand_into(self, both: Tensor) -> None:
        """dy B into the right columns of both (M, N + R)."""
        p, outputs = self.projection, self.outputs
        if self.b is not None:
            if p.rank < self.rank:
                both[:, outputs + p.rank :].zero_()
            torch.mm(both[:, :outputs], self.b, out=both[:, outputs : outputs + p.rank])

    def unpacked(self, columns: slice) -> Tensor:
        """[W ; A'] of these of the K columns (N + R, width), for a packed W."""
        whole = self.like.new_empty(self.outputs + self.rank, columns.stop - columns.start)
        unpack_group([Part(self.projection.weight)], whole[: self.outputs], columns, self.impl)
        if self.a is not None:
            whole[self.outputs :] = self.a[:, columns]
        return whole

    def parameter_gradients(self, x: Tensor, xa: Tensor | None, both: Tensor, out: Adapters) -> None:
        """dA and dB into `out`; `both` as `input_gradient` left it."""
        if out.a is None or out.b[0] is None or xa is None:
            return
        gradient_of_a([self.projection], out.a, both[:, self.outputs :], x)
        torch.mm(both[:, : self.outputs].T, xa[:, : self.projection.rank], out=out.b[0])


def _slices(sizes) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise([0, *accumulate(sizes)])]
