"""Packed attention on torch's own FlashAttention (varlen), shared prefixes included.

The keys of a child are two stretches, its own and its parent's, so each part is a call of its own: causal over every
segment, and all children of a prefix (one stretch of queries) against the prefix without a mask. With each part's
output o_i and log-sum-exp l_i over its own keys,

    l = log(sum_i exp(l_i)),    o = sum_i exp(l_i - l) o_i.

The backward needs no merging. Part i's backward, given the merged o and l instead of its own, computes P = exp(S - l),
the true probabilities of its keys, and delta = rowsum(dO * o), the true delta; so its dK and dV are exact, and the
parts' dQ add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.attention_merge import merge_
from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.packed_layout import PackedLayout


class Part(NamedTuple):
    """One varlen call. cu_q, cu_k: (sequences + 1,) int32; max_q, max_k: the longest; window: None or its size."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    scale: float
    window: int | None = None

    def arguments(self) -> tuple:
        # torch takes another path for single queries, with another shape of lse.
        return self.cu_q, self.cu_k, max(2, self.max_q), max(1, self.max_k), 0.0, self.causal

    def options(self) -> dict[str, Any]:
        if self.window is None:
            return {"scale": self.scale}
        return {"scale": self.scale, "window_size_left": self.window - 1, "window_size_right": 0}


class Varlen(NamedTuple):
    """forward(q, k, v, part) -> out, lse (Hq, T) float32; backward(dout, q, k, v, out, lse, part) -> dq, dk, dv."""

    forward: Callable[[Tensor, Tensor, Tensor, Part], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Part], tuple[Tensor, Tensor, Tensor]]


def _aten_forward(q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    result = torch.ops.aten._flash_attention_forward(q, k, v, *part.arguments(), False, **part.options())
    return result[0], result[1]


def _aten_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which is 0
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *part.arguments(), unused, unused[:0], **part.options()
    )


TORCH_FLASH = Varlen(_aten_forward, _aten_backward)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    rule: Rule,
    varlen: Varlen = TORCH_FLASH,
) -> Tensor:
    """`packed_attention` on checked arguments, without a softcap; a window only where nobody has a parent.

    varlen: who computes a part; torch's on CUDA, in 16 bits, for head sizes that are multiples of 8 up to 256.
    """
    cu, longest = layout.cu_seqlens, layout.max_length
    own = Part(cu, cu, longest, longest, True, rule.scale, rule.window)
    shared = shared_part(layout, rule.scale) if layout.has_parents else None
    return _FlashAttention.apply(q, k, v, layout, own, shared, varlen)  # pyright: ignore


def shared_part(layout: PackedLayout, scale: float) -> Part:
    """Children against their prefixes, the prefixes' keys gathered side by side (`PackedLayout.prefix_tokens`).

    Every query of the pack is in it; those that have no parent, in sequences without keys, since sequences follow each
    other without a gap.
    """

    def make() -> tuple[Tensor, Tensor, int, int]:
        ends_q, ends_k = [0], [0]
        for first, begin, end in layout.families:
            ends_q += [begin, end]
            ends_k += [ends_k[-1], ends_k[-1] + begin - first]
        if ends_q[-1] < layout.tokens:
            ends_q.append(layout.tokens)
            ends_k.append(ends_k[-1])
        longest = [max(b - a for a, b in zip(ends[:-1], ends[1:], strict=True)) for ends in (ends_q, ends_k)]
        cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32).to(layout.device) for ends in (ends_q, ends_k))
        return cu_q, cu_k, longest[0], longest[1]

    return Part(*layout.derived("shared_part", make), causal=False, scale=scale)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, own: Part, shared: Part | None, varlen: Varlen
    ) -> Tensor:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = varlen.forward(q, k, v, own)
        if shared is not None:
            places = layout.prefix_tokens
            far_out, far_lse = varlen.forward(q, k[places], v[places], shared)
            merge_(out, lse, far_out, far_lse, child_tokens(layout))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = layout, own, shared, varlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        layout, own, shared, varlen = ctx.how
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        dq, dk, dv = varlen.backward(dout, q, k, v, out, lse, own)
        if shared is not None:
            places = layout.prefix_tokens
            far = varlen.backward(dout, q, k[places], v[places], out, lse, shared)
            dq += far[0]  # exact zeros where there is no parent: no keys, nothing summed
            dk[places] += far[1]
            dv[places] += far[2]
        return dq, dk, dv, None, None, None, None


def child_tokens(layout: PackedLayout) -> Tensor:
    """int64, the places of all tokens that have a parent segment."""

    def make() -> Tensor:
        return torch.cat([torch.arange(begin, end) for _, begin, end in layout.families]).to(layout.device)

    return layout.derived("child_tokens", make)
