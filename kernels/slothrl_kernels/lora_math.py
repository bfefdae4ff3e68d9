"""Projections with LoRA (Hu et al., arXiv:2106.09685) that share their input: values and gradients, without autograd.

M: tokens, K: inputs, N_i: outputs of projection i, r_i its rank, R: the sum of the ranks, rounded up to 8.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T
    dx  = sum_i dy_i W_i + s_i (dy_i B_i) A_i        dA_i = s_i (dy_i B_i)^T x        dB_i = s_i dy_i^T (x A_i^T)

The rank products are a few per cent of the FLOPs, but one by one they read and write (M, N) and (M, K) again: a fifth
to a third of the base GEMM's time at 8K tokens on an H100. Where W is unpacked into a buffer anyway, they ride in that
GEMM. With A' = s A of all projections below each other (R, K), so that nothing else needs the scaling:

    wide (sum N > K)    W' = [W_i | B_i]: [x | x A'^T] W'^T is y_i; dy_i W' = [dy_i W_i | dy_i B_i], lacking a (R, K)
    tall (N <= K)       W' = [W ; A']: x W'^T = [x W^T | x A'^T], lacking a (N, R); [dy | dy B] W' is dx
    narrow              nothing rides: for few tokens, and for dense weights, which are multiplied where they are

The R more output columns are free where they fall into a wave of tiles that was not full: K = 4096 is 32 tiles of 128,
and 33 divides the 132 processors of an H100. All W_i are unpacked in turn into one buffer, of the largest one's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slothrl_kernels.base_weight import BaseWeight, dense
from slothrl_kernels.nf4_config import GEMM_ROWS
from slothrl_kernels.nf4_matmul import nf4_matmul
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import Impl

Layout = Literal["auto", "narrow", "wide", "tall"]
LAYOUTS = ("auto", "narrow", "wide", "tall")


class Projection(NamedTuple):
    """One frozen linear layer and its LoRA; a tuple, because one is made at every call and a dataclass takes longer.

    weight: W (N, K). bias: (N,) or None. a: (r, K) and b: (N, r), any float dtype, or both None: no LoRA.
    scaling: s, alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
    """

    weight: BaseWeight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.size(0)


Group = Sequence[Projection]


def settle(group: Group, rows: int, layout: Layout = "auto") -> Layout:
    """The layout for `rows` tokens: what was asked for, or by bytes moved (see the head of this file).

    Raises:
        ValueError: an unknown layout, or "tall" for more than one projection.
    """
    if layout not in LAYOUTS or (layout == "tall" and len(group) > 1):
        raise ValueError(f"layout {layout!r} for {len(group)} projections; layouts are {', '.join(LAYOUTS)}")
    packed = not any(isinstance(p.weight, Tensor) for p in group)
    if not any(p.rank for p in group) or (layout == "auto" and not (packed and rows > GEMM_ROWS)):
        return "narrow"
    if layout != "auto":
        return layout
    if sum(p.weight.shape[0] for p in group) > group[0].weight.shape[1]:
        return "wide"
    return "tall" if len(group) == 1 else "narrow"


def project(
    x: Tensor, group: Group, layout: Layout = "auto", impl: Impl = "auto"
) -> tuple[list[Tensor], Tensor | None]:
    """x (M, K) -> every y_i (M, N_i), and x A'^T (M, R), which the gradients need; None without any LoRA."""
    settled = settle(group, x.size(0), layout)
    a = stacked_a(group, x)
    if a is None:
        return [_base(x, p, impl, {}) for p in group], None
    if settled == "wide":
        xa = x @ a.T
        return _forward_wide(torch.cat([x, xa], 1), group, impl), xa
    if settled == "tall":
        return _forward_tall(x, a, group[0], impl)
    xa, buffers = x @ a.T, {}
    outputs = []
    for p, span in zip(group, _spans(group), strict=True):
        y = _base(x, p, impl, buffers)
        outputs.append(y.addmm_(xa[:, span], p.b.to(x.dtype).T) if p.b is not None else y)
    return outputs, xa


def input_gradient(
    to_y: Sequence[Tensor], group: Group, wanted: bool = True, layout: Layout = "auto", impl: Impl = "auto"
) -> tuple[Tensor | None, Tensor | None]:
    """dx (M, K), and every dy_i B_i (M, R), which the adapters' gradients need; None without any LoRA.

    Args:
        to_y: the gradient of every y_i (M, N_i), in the dtype of the computation.
        wanted: whether dx is; without it no base weight is unpacked.
    """
    a, inputs = stacked_a(group, to_y[0]), group[0].weight.shape[1]
    settled = settle(group, to_y[0].size(0), layout)
    if settled == "wide" and a is not None and wanted:
        both = _backward_wide(to_y, a.size(0), group, impl)  # (M, K + R)
        return torch.addmm(both[:, :inputs], both[:, inputs:], a), both[:, inputs:]
    to_xa = None if a is None else _through_b(to_y, a.size(0), group)
    return _backward_x(to_y, to_xa, a, group, settled, impl) if wanted else None, to_xa


def parameter_gradients(
    x: Tensor | None,
    xa: Tensor | None,
    to_xa: Tensor | None,
    to_y: Sequence[Tensor],
    group: Group,
    wants_bias: Sequence[bool],
) -> list[Tensor | None]:
    """dA_1, dB_1, dbias_1, dA_2, …: each in its parameter's dtype; None where there is none, or x was not kept.

    Args:
        x, xa: the input (M, K) of `project` and its second result.
        to_xa, to_y: as `input_gradient` gives and takes them.
        wants_bias: one a projection.
    """
    whole = None if x is None or to_xa is None else to_xa.T @ x  # (R, K)
    result: list[Tensor | None] = []
    for to, p, span, wants in zip(to_y, group, _spans(group), wants_bias, strict=True):
        if p.a is None or p.b is None or whole is None or xa is None:
            result += [None, None]
        else:
            result += [whole[span].to(p.a.dtype).mul_(p.scaling), (to.T @ xa[:, span]).to(p.b.dtype)]
        result.append(to.sum(0).to(p.bias.dtype) if p.bias is not None and wants else None)
    return result


def _spans(group: Group) -> list[slice]:
    """Which of the R columns are whose."""
    ends = list(accumulate(p.rank for p in group))
    return [slice(end - p.rank, end) for p, end in zip(group, ends, strict=True)]


def stacked_a(group: Group, x: Tensor) -> Tensor | None:
    """A' (R, K) in the dtype of `x`, rows of zeros up to a multiple of 8: tensor cores want rows of 16 bytes."""
    count = sum(p.rank for p in group)
    if not count:
        return None
    stacked = x.new_empty(-(-count // 8) * 8, group[0].weight.shape[1])
    for p, span in zip(group, _spans(group), strict=True):
        if p.a is not None:
            torch.mul(p.a.detach(), p.scaling, out=stacked[span])  # rounded once, from the adapter's own dtype
    if count < stacked.size(0):
        stacked[count:].zero_()
    return stacked


def _unpacked(p: Projection, like: Tensor, impl: Impl, buffers: dict[int, Tensor]) -> Tensor:
    """W (N, K) in the dtype of `like`; packed weights take turns in one buffer."""
    if isinstance(p.weight, Tensor):
        return dense(p.weight, like.dtype)
    outputs, inputs = p.weight.shape
    if 0 not in buffers or buffers[0].size(0) < outputs:
        buffers[0] = like.new_empty(outputs, inputs)
    return dense(p.weight, like.dtype, buffers[0][:outputs], impl)


def _base(x: Tensor, p: Projection, impl: Impl, buffers: dict[int, Tensor]) -> Tensor:
    bias = None if p.bias is None else p.bias.detach().to(x.dtype)
    if isinstance(p.weight, Nf4Weight) and x.size(0) <= GEMM_ROWS:
        return nf4_matmul(x, p.weight, bias, impl)
    return F.linear(x, _unpacked(p, x, impl, buffers), bias)


def _wide_weights(group: Group, rank: int, like: Tensor, impl: Impl):
    """[W_i | B_i at its own columns of R], one after the other in the same memory."""
    inputs = group[0].weight.shape[1]
    buffer = like.new_empty(max(p.weight.shape[0] for p in group), inputs + rank)
    for p, span in zip(group, _spans(group), strict=True):
        whole = buffer[: p.weight.shape[0]]
        dense(p.weight, like.dtype, whole[:, :inputs], impl)
        if p.rank < rank:
            whole[:, inputs:].zero_()
        if p.b is not None:
            whole[:, inputs + span.start : inputs + span.stop] = p.b.detach()
        yield p, whole


def _forward_wide(both: Tensor, group: Group, impl: Impl) -> list[Tensor]:
    """both: [x | x A'^T] (M, K + R)."""
    outputs, rank = [], both.size(1) - group[0].weight.shape[1]
    for p, whole in _wide_weights(group, rank, both, impl):
        outputs.append(F.linear(both, whole, None if p.bias is None else p.bias.detach().to(both.dtype)))
    return outputs


def _backward_wide(to_y: Sequence[Tensor], rank: int, group: Group, impl: Impl) -> Tensor:
    """[sum of dy_i W_i | every dy_i B_i] (M, K + R)."""
    total = None
    for to, (_, whole) in zip(to_y, _wide_weights(group, rank, to_y[0], impl), strict=True):
        total = to @ whole if total is None else total.addmm_(to, whole)
    assert total is not None
    return total


def _tall_weight(p: Projection, a: Tensor, impl: Impl) -> Tensor:
    """[W ; A'] (N + R, K)."""
    outputs = p.weight.shape[0]
    whole = a.new_empty(outputs + a.size(0), a.size(1))
    dense(p.weight, a.dtype, whole[:outputs], impl)
    whole[outputs:] = a
    return whole


def _forward_tall(x: Tensor, a: Tensor, p: Projection, impl: Impl) -> tuple[list[Tensor], Tensor]:
    assert p.b is not None
    outputs = p.weight.shape[0]
    both = x @ _tall_weight(p, a, impl).T  # (M, N + R)
    xa = both[:, outputs:].contiguous()
    y = torch.addmm(both[:, :outputs], xa[:, : p.rank], p.b.detach().to(x.dtype).T)
    return [y if p.bias is None else y.add_(p.bias.detach())], xa


def _through_b(to_y: Sequence[Tensor], rank: int, group: Group) -> Tensor:
    """Every dy_i B_i (M, R)."""
    full = sum(p.rank for p in group) == rank
    result = (to_y[0].new_empty if full else to_y[0].new_zeros)((to_y[0].size(0), rank))
    for to, p, span in zip(to_y, group, _spans(group), strict=True):
        if p.b is not None:
            torch.mm(to, p.b.detach().to(to.dtype), out=result[:, span])
    return result


def _backward_x(
    to_y: Sequence[Tensor], to_xa: Tensor | None, a: Tensor | None, group: Group, layout: Layout, impl: Impl
) -> Tensor:
    """dx (M, K), narrow or tall."""
    if layout == "tall" and to_xa is not None and a is not None:
        return torch.cat([to_y[0], to_xa], 1) @ _tall_weight(group[0], a, impl)
    total, buffers = None, {}
    for to, p in zip(to_y, group, strict=True):
        weight = _unpacked(p, to, impl, buffers)
        total = to @ weight if total is None else total.addmm_(to, weight)
    assert total is not None
    return total if to_xa is None or a is None else total.addmm_(to_xa, a)
