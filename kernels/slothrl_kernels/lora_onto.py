"""One projection with LoRA whose result is added to a residual, inside a larger step; letters as in `lora_group`.

residual + [x | x A'^T] [W | B]^T; [dy | dy B] [W ; A'] is dx
"""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl_kernels.base_weight import dense
from slothrl_kernels.lora_flat import Adapters, gradient_of_a
from slothrl_kernels.lora_math import Projection
from slothrl_kernels.nf4_group import Part, unpack_group
from slothrl_kernels.switch import Impl


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
