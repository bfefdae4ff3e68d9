"""The adapters of several groups of projections side by side in one piece of memory: their values, their gradients.

One by one, casting and scaling fourteen adapters of a layer and as many gradients is most of what the host launches for
it. Here it is one launch for the values (`adapter_cast`), A' = s A of a group below each other (R, K) and every B_i
(N_i, r_i) in the dtype of the computation, and one for the gradients, which GEMMs write where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from slothrl_kernels.adapter_cast import cast_into
from slothrl_kernels.lora_math import Projection

Groups = Sequence[Sequence[Projection]]


class Adapters(NamedTuple):
    """Those of one group, or their gradients. a: (R, K), R the ranks' sum rounded up to 8; b: (N_i, r_i) each; None
    where there is none."""

    a: Tensor | None
    b: list[Tensor | None]


def adapter_values(groups: Groups, like: Tensor, flat: Tensor | None = None) -> list[Adapters]:
    """A' and B of every group in the dtype and on the device of `like`; rows that only fill up A' are zeros.

    The scaling multiplies A after it is rounded: a power of two, as alpha / r mostly is, rounds nothing more.

    Args:
        flat: (`count_of(groups)`,) of that dtype and device: where they go, instead of new memory.
    """
    places = _places_of(groups)
    flat = like.new_empty(places.count) if flat is None else flat
    found, first = _views(places, flat), flat.storage_offset()
    sources, begins, factors = [], [], []
    for group, adapters, place in zip(groups, found, places.groups, strict=True):
        if adapters.a is None:
            continue
        if place.spans[-1].stop < adapters.a.size(0):
            adapters.a[place.spans[-1].stop :].zero_()
        for p, span, b in zip(group, place.spans, adapters.b, strict=True):
            if p.a is not None and p.b is not None and b is not None:
                sources += [p.a.detach(), p.b.detach()]
                begins += [part.storage_offset() - first for part in (adapters.a[span], b)]
                factors += [float(p.scaling), 1.0]
    cast_into(flat, sources, begins, factors)
    return found


class AdapterGradients:
    """Memory for the gradients of every group's adapters: of A, as `gradient_of_a` writes it, and of every B.

    found: written to by whoever computes them, all of it. flat: as `adapter_values` takes it.
    """

    def __init__(self, groups: Groups, like: Tensor, flat: Tensor | None = None) -> None:
        self.groups, self.places = groups, _places_of(groups)
        self.flat = like.new_empty(self.places.count) if flat is None else flat
        self.found = _views(self.places, self.flat)

    def finish(self) -> list[Tensor | None]:
        """dA_1, dB_1, dA_2, … in the order of the projections and their parameters' dtypes; parts of one tensor."""
        dtypes = {t.dtype for group in self.groups for p in group for t in (p.a, p.b) if t is not None}
        found = self.found
        if len(dtypes) == 1 and self.flat.dtype not in dtypes:
            found = _views(self.places, self.flat.to(dtypes.pop()))
        result: list[Tensor | None] = []
        for group, adapters, place in zip(self.groups, found, self.places.groups, strict=True):
            for p, span, b in zip(group, place.spans, adapters.b, strict=True):
                if p.a is None or p.b is None or adapters.a is None or b is None:
                    result += [None, None]
                else:
                    result += [adapters.a[span].to(p.a.dtype), b.to(p.b.dtype)]
        return result


def count_of(groups: Groups) -> int:
    """Entries that all adapters of these groups take beside each other."""
    return _places_of(groups).count


def adapters_in(groups: Groups, flat: Tensor) -> list[Adapters]:
    """What `adapter_values` put into `flat`."""
    return _views(_places_of(groups), flat)


def rank_of(group: Sequence[Projection]) -> int:
    """R, the rows of A': the ranks' sum rounded up to 8."""
    return -(-sum(p.rank for p in group) // 8) * 8


def views_of_gradients(groups: Groups, flat: Tensor) -> list[Tensor | None]:
    """dA_1, dB_1, dA_2, … as parts of `flat`: what is in an `AdapterGradients.flat`, in the parameters' dtype."""
    sizes, places = _pieces(_shapes_of(groups))
    found = flat.split(sizes)
    return [None if place is None else found[place[0]].view(place[1]) for place in places]


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


@lru_cache(256)
def _spans(ranks: tuple[int, ...]) -> list[slice]:
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


class _Place(NamedTuple):
    """A group's shapes: of A', of every B, None where there is none; and which rows of A' are whose."""

    a: tuple[int, int] | None
    b: list[tuple[int, int] | None]
    spans: list[slice]


class _Places(NamedTuple):
    """Every group's, the sizes of what there is, one after the other, and their sum."""

    groups: list[_Place]
    sizes: list[int]
    count: int


Shapes = tuple[tuple[tuple[int, int, int], ...], ...]


def _shapes_of(groups: Groups) -> Shapes:
    """(r, N, K) of every projection of every group."""
    return tuple(tuple((p.rank, p.weight.shape[0], p.weight.shape[1]) for p in group) for group in groups)


def _places_of(groups: Groups) -> _Places:
    return _places(_shapes_of(groups))


@lru_cache(256)
def _pieces(shapes: Shapes) -> tuple[list[int], list[tuple[int, tuple[int, int]] | None]]:
    """Of one split of everything: the sizes; for every A and B which piece it is, and its shape, None without one."""
    sizes, places = [], []
    for group in shapes:
        adapted = [shape for shape in group if shape[0]]
        of_a, first = [rank * inputs for rank, _, inputs in adapted], len(sizes)
        rows = sum(rank for rank, _, _ in adapted)
        sizes += [*of_a, (-rows % 8) * group[0][2], *(rank * outputs for rank, outputs, _ in adapted)]
        for rank, outputs, inputs in group:
            if rank:
                places += [(first, (rank, inputs)), (first + len(adapted) + 1, (outputs, rank))]
                first += 1
            else:
                places += [None, None]
    return sizes, places


@lru_cache(256)
def _places(shapes: Shapes) -> _Places:
    found, sizes = [], []
    for group in shapes:
        ranks = tuple(rank for rank, _, _ in group)
        rows = -(-sum(ranks) // 8) * 8  # tensor cores want rows of x A'^T of 16 bytes
        a = (rows, group[0][2]) if rows else None
        found.append(_Place(a, [(outputs, rank) if rank else None for rank, outputs, _ in group], _spans(ranks)))
        sizes += [shape[0] * shape[1] for shape in (a, *found[-1].b) if shape]
    return _Places(found, sizes, sum(sizes))


def _views(places: _Places, flat: Tensor) -> list[Adapters]:
    pieces = iter(flat.split(places.sizes))
    return [
        Adapters(place.a and next(pieces).view(place.a), [shape and next(pieces).view(shape) for shape in place.b])
        for place in places.groups
    ]
