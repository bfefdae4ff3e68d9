"""A kernel that starts while the one before it still runs: programmatic dependent launch, from Hopper on.

Source: NVIDIA's CUDA programming guide, "Programmatic Dependent Launch and Synchronization". The first kernel calls
`let_next_start` at once; the second is launched with Triton's `launch_pdl`, does what needs nothing of the first, and
calls `wait_for_last` before it reads or writes anything else: that returns when the first is finished and its writes
are visible. The hardware waits, so nothing can deadlock, and a CUDA graph keeps it as an edge between the two launches.

Rules for a pair: nothing else may be launched between the two (a memset would take the edge); the first is launched
plainly, so it starts when all before it is done; every program of the second waits, so what comes after may rely on it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from slothrl_kernels.switch import HAS_TRITON, interpreted, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


def starts_early(device: torch.device) -> bool:
    """Whether kernels on this device may be paired so: NVIDIA's, from compute capability 9.0 on, not interpreted."""
    return device.type == "cuda" and _serves(device)


@cache
def _serves(device: torch.device) -> bool:
    return torch.version.cuda is not None and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


@jit
def let_next_start():
    tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore


@jit
def wait_for_last():
    tl.extra.cuda.gdc_wait()  # pyright: ignore


@jit
def ask_for(addresses, size):
    """Have `size` bytes (a multiple of 16, none below 1) from each address on brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r",
        [addresses.to(tl.int64), tl.zeros(addresses.shape, tl.int32) + size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
