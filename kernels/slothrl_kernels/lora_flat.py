"""The adapters of several groups of projections side by side in one piece of memory: their values, their gradients.

One by one, casting and scaling fourteen adapters of a layer and as many gradients is most of what the host launches for
it. Here it is two launches for the values, A' = s A of a group below each other (R, K) and every B_i (N_i, r_i) in the
dtype of the computation, and one for the gradients, which GEMMs write where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from slothrl_kernels.lora_math import Projection

Groups = Sequence[Sequence[Projection]]


class Adapters(NamedTuple):
    """Those of one group, or their gradients. a: (R, K), R the ranks' sum rounded up to 8; b: (N_i, r_i) each; None
    where there is none."""

    a: Tensor | None
    b: list[Tensor | None]


def adapter_values(groups: Groups, like: Tensor) -> list[Adapters]:
    """A' and B of every group in the dtype and on the device of `like`; rows that only fill up A' are zeros.

    The scaling multiplies A after it is rounded: a power of two, as alpha / r mostly is, rounds nothing more.
    """
    _, found = _pieces(groups, like)
    targets, sources, scaled, scales = [], [], [], []
    for group, adapters in zip(groups, found, strict=True):
        if adapters.a is None:
            continue
        end = sum(p.rank for p in group)
        if end < adapters.a.size(0):
            adapters.a[end:].zero_()
        for p, span, b in zip(group, spans_of(group), adapters.b, strict=True):
            if p.a is not None and p.b is not None:
                part = adapters.a[span]
                targets += [part, b]
                sources += [p.a.detach(), p.b.detach()]
                scaled.append(part)
                scales.append(float(p.scaling))
    if targets:
        torch._foreach_copy_(targets, sources)
    if any(scale != 1.0 for scale in scales):
        torch._foreach_mul_(scaled, scales)
    return found


class AdapterGradients:
    """Memory for the gradients of every group's adapters: of A' without the scaling, and of every B.

    found: written to by whoever computes them, all of it.
    """

    def __init__(self, groups: Groups, like: Tensor) -> None:
        self.groups = groups
        self.flat, self.found = _pieces(groups, like)

    def finish(self) -> list[Tensor | None]:
        """dA_1, dB_1, dA_2, … in the order of the projections and their parameters' dtypes; parts of one tensor."""
        dtypes = {t.dtype for group in self.groups for p in group for t in (p.a, p.b) if t is not None}
        found = self.found
        if len(dtypes) == 1 and self.flat.dtype not in dtypes:
            found = _views(self.groups, self.flat.to(dtypes.pop()))
        result: list[Tensor | None] = []
        for group, adapters in zip(self.groups, found, strict=True):
            for p, span, b in zip(group, spans_of(group), adapters.b, strict=True):
                if p.a is None or p.b is None or adapters.a is None or b is None:
                    result += [None, None]
                else:
                    result += [adapters.a[span].to(p.a.dtype), b.to(p.b.dtype)]
        return result


def gradient_of_a(group: Sequence[Projection], out: Tensor, to_xa: Tensor, x: Tensor) -> None:
    """Every dA_i = s_i (dy_i B_i)^T x into its rows of out (R, K), from all dy_i B_i (M, R) and x (M, K)."""
    scales = {float(p.scaling) for p in group if p.a is not None}
    alike = len(scales) == 1
    torch.addmm(out, to_xa.T, x, beta=0, alpha=scales.pop() if alike else 1.0, out=out)
    if not alike:
        adapted = [(out[span], float(p.scaling)) for p, span in zip(group, spans_of(group), strict=True) if p.rank]
        torch._foreach_mul_([part for part, _ in adapted], [scale for _, scale in adapted])


def spans_of(group: Sequence[Projection]) -> list[slice]:
    """Which rows of A' are whose."""
    return _spans(tuple(p.rank for p in group))


def padded(ranks: Sequence[int]) -> int:
    """Rows of A': tensor cores want rows of x A'^T of 16 bytes."""
    return -(-sum(ranks) // 8) * 8


@lru_cache(256)
def _spans(ranks: tuple[int, ...]) -> list[slice]:
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def _pieces(groups: Groups, like: Tensor) -> tuple[Tensor, list[Adapters]]:
    flat = like.new_empty(sum(_sizes(groups)))
    return flat, _views(groups, flat)


def _sizes(groups: Groups) -> list[int]:
    """Numbers of A' and of every B, group after group."""
    sizes = []
    for group in groups:
        sizes.append(padded([p.rank for p in group]) * group[0].weight.shape[1])
        sizes += [p.rank * p.weight.shape[0] for p in group]
    return sizes


def _views(groups: Groups, flat: Tensor) -> list[Adapters]:
    pieces, found = iter(flat.split(_sizes(groups))), []
    for group in groups:
        a = next(pieces).view(-1, group[0].weight.shape[1])
        b = [next(pieces).view(p.weight.shape[0], p.rank) if p.rank else next(pieces) for p in group]
        found.append(Adapters(a if a.size(0) else None, [v if p.rank else None for v, p in zip(b, group, strict=True)]))
    return found
