"""What the adapters need of dy in one pass over it: every dy_i B_i, and every dB_i = dy_i^T (x A_i'^T).

dy of 8,192 tokens and q, k and v of an 8B model is 100 MB, of gate and up 470. GEMMs with 16 columns read it once for
dy B and once more for dB, projection by projection.

Sums over columns of dy, and over tokens, are made in float32 in a fixed order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slothrl_kernels.lora_pass_kernels import strips_kernel, sums_kernel
from slothrl_kernels.switch import HAS_TRITON, Impl, processors, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton

MOST = 3  # projections of one pass, as `strips_kernel` has it
RANK = 64  # at most: of each projection's sums a program holds as many columns in registers
SUMMED = 64  # rows that a program sums up
Adapted = Sequence[Tensor | None]


def lora_pass_reference(
    to_y: Tensor, xa: Tensor, outputs: Sequence[int], b: Sequence[Tensor | None], to_xa: Tensor, to_b: Adapted
) -> None:
    """The plain-torch truth of `lora_pass`, with the same arguments; float64 too."""
    begin = start = 0
    for count, values, found in zip(outputs, b, to_b, strict=True):
        if values is not None:
            gradient, span = to_y[:, begin : begin + count], slice(start, start + values.size(1))
            torch.mm(gradient, values, out=to_xa[:, span])
            if found is not None:
                torch.mm(gradient.T, xa[:, span], out=found)
            start = span.stop
        begin += count


def lora_pass(
    to_y: Tensor,
    xa: Tensor,
    outputs: Sequence[int],
    b: Sequence[Tensor | None],
    to_xa: Tensor,
    to_b: Adapted,
    impl: Impl = "auto",
) -> None:
    """dy_i B_i and dB_i of projections whose outputs lie beside each other.

    Args:
        to_y: (M, N) gradients of all outputs, rows of unit stride.
        xa: (M, R or more) x A'^T, every projection's columns beside each other, rows of unit stride.
        outputs: N_i of each; N is their sum.
        b: B_i (N_i, r_i) of each, of to_y's dtype, or None: no LoRA, and no columns of xa.
        to_xa: (M, R or more), where every dy_i B_i goes, at the columns that xa has; others are left as they are.
        to_b: where dB_i (N_i, r_i) of each goes, or None where there is no B.
        impl: the kernels serve bfloat16, float16 and float32, up to three B of one rank that lie one below the other in
            memory, as their gradients do (`lora_flat`), of whole strips of outputs; else the reference runs.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    rank = sum(x.size(1) for x in b if x is not None)
    if to_y.size(1) != sum(outputs) or min(xa.size(1), to_xa.size(1)) < rank or not len(to_y) == len(xa) == len(to_xa):
        raise ValueError(f"{tuple(to_y.shape)}, {tuple(xa.shape)} and {tuple(to_xa.shape)} for {list(outputs)}, {rank}")
    shapes = [None if x is None else tuple(x.shape) for x in b]
    if shapes != [None if x is None else tuple(x.shape) for x in to_b]:
        raise ValueError(f"gradients of other shapes than {shapes}")
    if any(shape is not None and shape[0] != count for shape, count in zip(shapes, outputs, strict=True)):
        raise ValueError(f"{shapes} for {list(outputs)} outputs")
    values, found = ([x for x in some if x is not None] for some in (b, to_b))
    if len(values) == len(b) and serves(to_y, values, found, impl):
        _run(to_y, xa, values, to_xa, found)
    else:
        lora_pass_reference(to_y, xa, outputs, b, to_xa, to_b)


class Tile(NamedTuple):
    """Of `strips_kernel`: columns of dy and tokens at a time."""

    columns: int
    rows: int
    warps: int


# Within 7 % of the fastest of eight on an H100, over 4,096 to 16,384 tokens; and what fits everywhere.
LARGE, SMALL = Tile(256, 64, 8), Tile(128, 64, 4)
SHARED = 128 << 10  # bytes of shared memory that a program may have where LARGE fits


def tile_of(device: torch.device) -> Tile:
    if device.type != "cuda":
        return SMALL
    return LARGE if torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= SHARED else SMALL


def serves(to_y: Tensor, b: Sequence[Tensor], to_b: Sequence[Tensor], impl: Impl) -> bool:
    """Whether `lora_pass` runs its kernels on these."""
    if not b or len(b) > MOST or not takes_triton(impl, to_y) or to_y.dtype == torch.float64:
        return False
    strips = all(x.size(0) % SMALL.columns == 0 for x in b)
    return strips and len({x.size(1) for x in b}) == 1 and b[0].size(1) <= RANK and _stacked(b) and _stacked(to_b)


def _stacked(tensors: Sequence[Tensor]) -> bool:
    """Whether they lie one below the other in memory."""
    place = tensors[0].data_ptr()
    for x in tensors:
        if not x.is_contiguous() or x.data_ptr() != place:
            return False
        place += x.nbytes
    return True


def _run(to_y: Tensor, xa: Tensor, b: Sequence[Tensor], to_xa: Tensor, to_b: Sequence[Tensor]) -> None:
    (tokens, outputs), rank, tile = to_y.shape, b[0].size(1), tile_of(to_y.device)
    if any(x.size(0) % tile.columns for x in b) or to_y.dtype == torch.float32:
        tile = SMALL
    if not tokens:
        for x in to_b:
            x.zero_()
        return
    ends = [sum(x.size(0) for x in b[: i + 1]) for i in range(MOST)]  # those that are not there end where all do
    strips, wide = outputs // tile.columns, max(16, triton.next_power_of_2(rank))
    blocks = triton.cdiv(tokens, tile.rows)
    turns = max(1, blocks * strips // (2 * processors(to_y.device)))
    parts, summed = triton.cdiv(blocks, turns), triton.cdiv(tokens, SUMMED)
    through = torch.empty(strips, tokens, wide, dtype=torch.float32, device=to_y.device)
    partial = torch.empty(parts, outputs, wide, dtype=torch.float32, device=to_y.device)
    with torch.cuda.device_of(to_y):
        strips_kernel[(strips, parts)](
            to_y, xa, b[0], through, partial, tokens, outputs, rank, to_y.stride(0), xa.stride(0), ends[0], ends[1],
            turns, ROWS=tile.rows, COLUMNS=tile.columns, RANK=wide, num_warps=tile.warps,
        )  # fmt: skip
        sums_kernel[(len(b) * summed + triton.cdiv(outputs, SUMMED),)](
            through, partial, to_xa, to_b[0], tokens, outputs, rank, to_xa.stride(0), ends[0] // tile.columns,
            ends[1] // tile.columns, strips, parts, summed, len(b), ROWS=SUMMED, RANK=wide, num_warps=4,
        )  # fmt: skip
