"""The attention half of a decoder layer up to the o projection, forward and backward, without autograd around it.

Tokens are flat, M = B S. q, k and v lie beside each other, as one GEMM writes them, and their gradients do too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from slothrl_kernels.layer_parts import Keeper, LayerParts
from slothrl_kernels.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward
from slothrl_kernels.rope import rope_turn
from slothrl_kernels.row_copy import copy_rows


@dataclass
class Attended:
    """What attention was given and made: under autograd of its own, where a gradient is to follow.

    raw: (M, N) q, k and v as the projections made them, where norms follow; else None.
    q, k, v: (B, heads, S, width), leaves. out: (B, S, heads, width).
    """

    raw: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    @property
    def rows(self) -> Tensor:
        """(M, heads * width), without its history."""
        out = self.out.detach()
        return out.reshape(out.size(0) * out.size(1), -1)

    def differentiated(self, to_out: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v, from that of the output's rows (M, heads * width); once."""
        return torch.autograd.grad(self.out, (self.q, self.k, self.v), to_out.view(self.out.shape))


class Parked:
    """`Attended` without its tensors, which a keeper has; autograd's graph alone is here."""

    def __init__(self, attended: Attended, keeper: Keeper) -> None:
        self.keeper, self.shape = keeper, attended.out.shape
        self._end, self._leaves = get_gradient_edge(attended.out), (attended.q, attended.k, attended.v)
        self._out = keeper.pack(attended.out.detach(), first=True)
        self._raw = None if attended.raw is None else keeper.pack(attended.raw)
        keeper.close()
        nothing = self._leaves[0].new_empty(0)
        for x in self._leaves:
            x.data = nothing  # the graph holds its leaves, and would hold their memory

    @property
    def raw(self) -> Tensor | None:
        return None if self._raw is None else self.keeper.unpack(self._raw)

    @property
    def rows(self) -> Tensor:
        out = self.keeper.unpack(self._out)
        return out.reshape(out.size(0) * out.size(1), -1)

    def differentiated(self, to_out: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(self._end, self._leaves, to_out.view(self.shape))  # pyright: ignore
        self.keeper.close()
        return found


class Turned(NamedTuple):
    """q, k and v (B, heads, S, width) as attention takes them; raw as in `Attended`."""

    raw: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor


def attend(qkv: Tensor, shape: torch.Size, parts: LayerParts, watched: bool) -> Attended:
    """Norms of q and k, rotation and attention on qkv (M, N), which is written over where no norm follows.

    Args:
        shape: (B, S, h) of the layer's input.
        watched: whether a backward follows.
    """
    return attention(turn(qkv, shape, parts), parts, watched)


def turn(qkv: Tensor, shape: torch.Size, parts: LayerParts, out: Tensor | None = None) -> Turned:
    """Norms of q and k and rotation; over qkv (M, N) itself where there are no norms.

    out: (M, N) whose columns of q and k take what norms and rotation give, instead of new memory.
    """
    q, k, v = heads_of(qkv, shape, parts)
    tables, raw = parts.tables, None
    if tables is not None and parts.norms is not None:
        of_q, of_k, _ = heads_of(qkv if out is None else out, shape, parts)
        to = None if out is None else (of_q, of_k)
        q, k, raw = *qk_norm_rope_forward(q, k, *parts.norms, *tables, parts.norm, parts.impl, to), qkv
    elif tables is not None:
        q, k = rope_turn(q, k, *tables, in_place=True, impl=parts.impl)
    return Turned(raw, q, k, v)


def attention(turned: Turned, parts: LayerParts, watched: bool) -> Attended:
    """Attention alone, as its caller's function computes it."""
    raw, q, k, v = turned
    if not watched:
        with torch.no_grad():
            return Attended(raw, q, k, v, parts.attend(q, k, v))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    # What attention saves goes to the keeper or stays where it is, whatever hooks are around.
    keeper = parts.keeper if parts.keep == "attention" else None
    hooks: Any = (_same, _same) if keeper is None else (keeper.pack, keeper.unpack)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(*hooks):
        return Attended(raw, q, k, v, parts.attend(q, k, v))


def kept_of(attended: Attended, parts: LayerParts) -> Attended | Parked | None:
    """What a forward leaves of attention for the backward, as `parts` say."""
    if parts.keep == "input":
        return None
    return attended if parts.keeper is None or parts.keep == "all" else Parked(attended, parts.keeper)


def attend_backward(
    to_out: Tensor, attended: Attended | Parked, shape: torch.Size, parts: LayerParts, out: Tensor | None = None
) -> Tensor:
    """The gradient of qkv (M, N), in `out` or new memory, from that of the output's rows (M, heads * width)."""
    heads = parts.heads + 2 * parts.kv_heads
    beside = to_out.new_empty(to_out.size(0), heads * parts.width) if out is None else out
    tables, raw = parts.tables, attended.raw  # before its keeper is done
    to_q, to_k, to_v = attended.differentiated(to_out)
    q, k, v = heads_of(beside, shape, parts)
    if tables is not None and parts.norms is not None and raw is not None:
        raw_q, raw_k, _ = heads_of(raw, shape, parts)
        given = (to_q, to_k, raw_q, raw_k, *parts.norms, *tables, parts.norm)
        qk_norm_rope_backward(*given, impl=parts.impl, out=(q, k))
    elif tables is not None:
        rope_turn(to_q, to_k, *tables, backward=True, impl=parts.impl, out=(q, k))
    else:
        copy_rows(q, to_q), copy_rows(k, to_k)  # pyright: ignore
    copy_rows(v, to_v)
    return beside


def attention_backward(to_out: Tensor, attended: Attended | Parked, out: Tensor) -> None:
    """The gradients of q, k and v into `out`, beside each other (M, N), before `turn_back`; once."""
    found = [x.transpose(1, 2) for x in attended.differentiated(to_out)]  # (B, S, heads, width)
    if all(x.is_contiguous() for x in found):
        torch.cat([x.reshape(len(out), -1) for x in found], 1, out=out)
        return
    begin = 0
    for x in found:  # in the order of heads: one pass, not one to rows and one to the side of the others
        columns = x.size(2) * x.size(3)
        copy_rows(out[:, begin : begin + columns].view(x.shape), x)
        begin += columns


def turn_back(beside: Tensor, raw: Tensor | None, shape: torch.Size, parts: LayerParts) -> None:
    """Gradients of what `turn` made into those of what it was given, in place: beside (M, N), raw as `turn` gave it."""
    to_q, to_k, _ = heads_of(beside, shape, parts)
    tables = parts.tables
    if tables is not None and parts.norms is not None and raw is not None:
        q, k, _ = heads_of(raw, shape, parts)
        options = {"impl": parts.impl, "in_place": True}
        made = qk_norm_rope_backward(to_q, to_k, q, k, *parts.norms, *tables, parts.norm, **options)
        for target, value in ((to_q, made.q), (to_k, made.k)):
            if target.data_ptr() != value.data_ptr():  # the reference makes new ones
                target.copy_(value)
    elif tables is not None:
        rope_turn(to_q, to_k, *tables, backward=True, in_place=True, impl=parts.impl)


def heads_of(qkv: Tensor, shape: torch.Size, parts: LayerParts) -> list[Tensor]:
    """Views (B, heads, S, width) of q, k and v."""
    counts = [parts.heads, parts.kv_heads, parts.kv_heads]
    pieces = qkv.view(shape[0], shape[1], -1, parts.width).split(counts, 2)
    return [x.transpose(1, 2) for x in pieces]


def _same(x: Tensor) -> Tensor:
    return x
