"""The nf4 GEMM's work in equal shares: "stream-K" (Osama et al. 2023, arXiv 2301.03598).

All steps of all tiles stand in one line, tile after tile, and program p of P takes the p-th part of it: as many steps
as any other, but for one. So a share may begin and end inside of a tile. Who works on a tile follows from arithmetic;
of a tile that several programs share each leaves float32 sums in memory, and the last to arrive adds them in the order
of programs, whichever arrives last: the same bits every time. No program waits for another, so nothing rests on which
of them the hardware runs at the same time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from slothrl_kernels.switch import HAS_TRITON, interpreted, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@cache
def in_fragments(device: torch.device) -> bool:
    """Whether sums leave this device's tensor cores as `collect` may move them: not so on data-center Blackwell."""
    if device.type != "cuda" or torch.version.cuda is None or interpreted():
        return False
    return torch.cuda.get_device_capability(device)[0] in (8, 9, 12)


@jit
def share_begin(program, programs, units):
    """The first unit of a program's share; the next program's first is its end. 32 bits hold every product."""
    return program * (units // programs) + tl.minimum(program, units % programs)


@jit
def share_owner(unit, programs, units):
    """The program whose share holds a unit; at least one unit a program."""
    each = units // programs
    longer = units % programs  # the first shares are one unit longer
    edge = longer * (each + 1)
    return tl.where(unit < edge, unit // (each + 1), longer + (unit - edge) // each)


@jit
def _fragment(ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Where each of a tile's sums lies in memory: a tensor core's 16 x 8 together, and of these each thread's four."""
    row, token = tl.arange(0, ROWS)[:, None], tl.arange(0, TOKENS)[None, :]
    block = (row // 16 * (TOKENS // 8) + token // 8) * 128
    return block + row % 8 * 16 + token % 8 // 2 * 4 + row % 16 // 8 * 2 + token % 2


@jit
def _leave(addresses, total, FRAGMENTS: tl.constexpr):
    if FRAGMENTS:
        tl.inline_asm_elementwise(
            "st.global.cg.v4.f32 [$4], {$8, $9, $10, $11}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
            "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
            [addresses.to(tl.int64), total],
            dtype=tl.int32,
            is_pure=False,
            pack=4,
        )
    else:
        tl.store(addresses, total)


@jit
def _take(addresses, total, FRAGMENTS: tl.constexpr):
    """total plus what lies there, past L1, which is not coherent."""
    if FRAGMENTS:
        total = tl.inline_asm_elementwise(
            "{ .reg .f32 a, b, c, d; ld.global.cg.v4.f32 {a, b, c, d}, [$4];"
            "add.f32 $0, $8, a; add.f32 $1, $9, b; add.f32 $2, $10, c; add.f32 $3, $11, d; }",
            "=f,=f,=f,=f,l,l,l,l,f,f,f,f",
            [addresses.to(tl.int64), total],
            dtype=tl.float32,
            is_pure=False,
            pack=4,
        )
    else:
        total += tl.load(addresses, cache_modifier=".cg")
    return total


@jit
def collect(
    total, partials, arrived, tile, begin, steps, program, programs, units,
    FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """(sums of a whole tile, whether this program writes them), from its part of a tile that others share.

    total: (rows, tokens) sums from step `begin` of the tile's `steps` on. partials: float32, two tiles a program, as a
    share has at most one tile that others began and one that others end. arrived: int32 zeros, one a tile; zeros
    afterwards. FRAGMENTS: a thread holds its sums as mma.sync and wgmma leave them, and moves them as they are, four at
    a time; Triton's own loads and stores would take them through shared memory, and twice the registers.

    The program with a tile's first part comes to it last in its share, when the others, who came to theirs first, have
    mostly left them: then it writes nothing, and goes on from its own sums, which are first in the order anyway.
    """
    ROWS: tl.constexpr = total.shape[0]  # pyright: ignore
    TOKENS: tl.constexpr = total.shape[1]  # pyright: ignore
    first = share_owner(tile * steps, programs, units)
    after = share_owner(tile * steps + steps - 1, programs, units) + 1
    is_first = (begin == 0).to(tl.int32)
    here = _fragment(ROWS, TOKENS)
    ready = 0
    if begin == 0:
        ready = (tl.atomic_add(arrived + tile, 0, sem="acquire") == after - first - 1).to(tl.int32)
    last = ready
    if ready == 0:
        _leave(partials + (2 * program + is_first) * (ROWS * TOKENS) + here, total, FRAGMENTS)
        tl.debug_barrier()  # all threads' sums come before the one thread's arrival
        last = (tl.atomic_add(arrived + tile, 1, sem="acq_rel") == after - first - 1).to(tl.int32)
        total = tl.full((ROWS, TOKENS), -0.0, tl.float32)  # plus the first's: the first's, its zeros' signs too
    for other in range(first + ready, tl.where(last == 1, after, first)):
        slot = 2 * other + (other == first).to(tl.int32)
        total = _take(partials + slot * (ROWS * TOKENS) + here, total, FRAGMENTS)
    if last == 1:
        tl.store(arrived + tile, 0)  # as the next launch needs it
    return total, last
