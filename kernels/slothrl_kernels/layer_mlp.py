"""A decoder layer's MLP in tiles of its F inner columns: gate, up, their gradients and weights are never whole.

With M tokens, width h and a tile of t columns, the most values that are alive beside what goes in and out:

    whole     2 F M + F M + F h              gate and up, the gradient of their product, down's weight
              2 F M + 2 F h                  gate and up and their weights
    in tiles  2 t M + t M + 2 t h + t h      the same of a tile, and its gate and up weights, which serve both ways
              + h M                          the sum of the tiles' dx

8B (h 4,096, F 14,336) with 4,096 tokens in bf16: 470 MB whole, 352 + 34 in two tiles, 176 + 34 in four. No weight is
unpacked more often, and those of gate and up once less in the backward. The forward's product is whole, F M: y is one
GEMM, rounded once. The backward adds up the tiles' dx in the dtype of the computation, as autograd does with those of
gate and of up.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from slothrl_kernels.glu import glu_backward, glu_forward
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.lora_flat import Adapters, gradient_of_a
from slothrl_kernels.lora_group import LoraGroup
from slothrl_kernels.lora_onto import LoraOnto
from slothrl_kernels.nf4_group import Part, unpack_group
from slothrl_kernels.nf4_weight import Nf4Weight

TILE = 2**27  # bytes of gate and up that a tile may have; half of that cost 5 % of an 8B layer with 4,096 tokens
ROOMY = 15 * 2**30  # bytes of a device on which it may have twice as much: 1 to 3 % of such a layer for 113 MiB
MOST = 8  # tiles: each reads and writes the sum of dx once more
GRAIN = 128  # columns: what GEMMs are cut into


def tiles_of(parts: LayerParts, x: Tensor) -> list[slice]:
    """Which of the F columns are worked on together for x (M, h); one tile: all at once.

    Only nf4 weights are cut: they are unpacked a part at a time at no cost, where dense ones are there anyway.
    """
    inner = parts.down.weight.shape[1]
    packed = all(isinstance(p.weight, Nf4Weight) for p in (*parts.inner, parts.down))
    step = columns_of(x.size(0), inner, x.element_size(), tile_bytes(_memory_of(x.device))) if packed else inner
    return [slice(begin, min(begin + step, inner)) for begin in range(0, inner, step)]


def tile_bytes(total: int) -> int:
    """What gate and up of a tile may take on a device of `total` bytes."""
    return TILE if total < ROOMY else 2 * TILE


@cache
def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def columns_of(tokens: int, inner: int, width: int, tile: int) -> int:
    """Columns of a tile of so many bytes, F or fewer, for `tokens` of `inner` columns of `width` bytes a value."""
    count = min(MOST, -(-tokens * 2 * inner * width // tile))
    return inner if count < 2 else min(inner, -(-inner // count // GRAIN) * GRAIN)


def product(
    group: LoraGroup, both: Tensor, down: LoraOnto, parts: LayerParts, kept: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A buffer of down's with act(gate) * up in it, and gate and up beside each other (M, 2 F) where they are `kept`.

    Args:
        both: (M, h + R), a norm's result, whose right columns are written here.
        out: (M, F + R), the buffer of down's, instead of new memory.
    """
    tiles, out = tiles_of(parts, both), down.input_buffer(both.size(0)) if out is None else out
    if kept or len(tiles) == 1:
        inner = group.forward(both)
        gate, up = inner.chunk(2, 1)
        glu_forward(gate, up, parts.activation, parts.impl, out[:, : down.inputs])
        return out, inner if kept else None
    group.shrink_into(both)
    for tile in tiles:
        gate, up = _gate_up(group, both, _weights(group, tile), tile).chunk(2, 1)
        glu_forward(gate, up, parts.activation, parts.impl, out[:, tile])
        del gate, up
    return out, None


def tiled_backward(
    group: LoraGroup, both: Tensor, down: LoraOnto, upstream: Tensor, parts: LayerParts, gradients: list[Adapters]
) -> Tensor:
    """The gradient of the norm's result (M, h); the gradients of the adapters of gate, up and down go into theirs.

    Args:
        both: (M, h + R), whose right columns are written here. upstream: (M, h + R), dy in its left columns; likewise.
        gradients: of gate and up; of down.
    """
    of_inner, of_down = gradients
    group.shrink_into(both)
    down.expand_into(upstream)
    sums: dict[str, Tensor] = {}
    for tile in tiles_of(parts, both):
        weights = _weights(group, tile)
        inner = _gate_up(group, both, weights, tile)
        to_h = upstream @ down.unpacked(tile)
        h, to_inner = glu_gradients(inner, to_h, parts)
        del inner, to_h
        if down.a is not None and of_down.a is not None:
            _add(sums, "shrunk", h, down.a[:, tile].T)
            gradient_of_a([down.projection], of_down.a[:, tile], upstream[:, down.outputs :], h)
        del h
        _add(sums, "dx", to_inner, weights)
        _gradients_of_b(group, both, to_inner, tile, of_inner)
        del weights, to_inner
    if of_down.b[0] is not None:
        torch.mm(upstream[:, : down.outputs].T, sums["shrunk"][:, : down.projection.rank], out=of_down.b[0])
    wide = sums["dx"]  # (M, h + R)
    if group.a is None or of_inner.a is None:
        return wide
    to_xa = wide[:, group.inputs :]
    gradient_of_a(group.projections, of_inner.a, to_xa, both[:, : group.inputs])
    return wide[:, : group.inputs].addmm_(to_xa, group.a)


def glu_gradients(inner: Tensor, to_h: Tensor, parts: LayerParts) -> tuple[Tensor, Tensor]:
    """h (M, t), and the gradient of gate and up beside each other (M, 2 t), over the memory of dh, gate and up where a
    kernel runs."""
    gate, up = inner.chunk(2, 1)
    h, to_gate, to_up = glu_backward(gate, up, to_h, parts.activation, parts.impl, in_place=True)
    written_over = to_gate.data_ptr() == gate.data_ptr()
    return h, inner if written_over else torch.cat([to_gate, to_up], 1)


def _rows(group: LoraGroup, tile: slice) -> list[tuple[int, slice, slice]]:
    """(projection, its rows of gate or up in this tile, the same among all rows): gate and up may be one matrix."""
    half = group.outputs // 2
    other = slice(half + tile.start, half + tile.stop)
    return [(0, tile, tile), (1, tile, other) if len(group.projections) == 2 else (0, other, other)]


def _weights(group: LoraGroup, tile: slice) -> Tensor:
    """[W_gate | B_gate ; W_up | B_up] of a tile (2 t, h + R)."""
    found = []
    for i, rows, _ in _rows(group, tile):
        b = group.b[i]
        found.append(Part(group.projections[i].weight, None if b is None else b[rows], group.spans[i].start, rows))
    whole = group.like.new_empty(2 * (tile.stop - tile.start), group.inputs + group.rank)
    return unpack_group(found, whole, impl=group.impl)


def _gate_up(group: LoraGroup, both: Tensor, weights: Tensor, tile: slice) -> Tensor:
    """gate and up beside each other (M, 2 t)."""
    bias = group.bias()
    if bias is None:
        return both @ weights.T
    return torch.addmm(torch.cat([bias[rows] for _, _, rows in _rows(group, tile)]), both, weights.T)


def _gradients_of_b(group: LoraGroup, both: Tensor, to_inner: Tensor, tile: slice, out: Adapters) -> None:
    for (i, rows, _), to in zip(_rows(group, tile), to_inner.chunk(2, 1), strict=True):
        b, span = out.b[i], group.spans[i]
        if b is not None:
            torch.mm(to.T, both[:, group.inputs + span.start : group.inputs + span.stop], out=b[rows])


def _add(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    sums[name] = sums[name].addmm_(left, right) if name in sums else left @ right
