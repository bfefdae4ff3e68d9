"""A kernel that starts while the one before it still runs: programmatic dependent launch, from Hopper on.

Source: NVIDIA's CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX's `griddepcontrol`. A
kernel launched with Triton's `launch_pdl` may start when every program of the kernel before it on the stream has called
`let_next_start` or has ended. It does what needs nothing of that kernel, and calls `wait_for_last` before it reads or
writes anything else: that returns when the last kernel is finished and its writes are visible. The hardware waits, so
nothing can deadlock, and a CUDA graph keeps it as an edge between the two launches.

Rules for a chain of such kernels (`nf4_inputs` after anything at all, the nf4 GEMM after `nf4_inputs`):

1. Every program waits, whatever else it does. So the third kernel, which waits for the second alone, may rely on the
   first: the second was not finished before the first was. It follows too that memory is free to be written again, as
   the allocator and graphs do: whoever read it before has ended.
2. Before the wait no value is read, and nothing written. Not even what "was there long before": in eager mode the
   kernel just before may have written it (a LoRA pushed, then a prefill), or it may lie in memory just handed on.
   `ask_for` reads no value: it brings lines into L2, where whoever writes them later writes them too.
3. A kernel that lets the next start before it has waited itself must know the next: one that keeps rules 1 and 2, with
   nothing launched between (counters are made before the first of the two). After others it does not matter what comes:
   a kernel launched plainly starts when all before it is finished.
4. The kernel before may be anything. If it triggers early, the wait covers it; if it never does, the start waits for
   its programs' end and the wait for its writes; a memset, a copy or another stream's event is waited for whole.
5. What follows the chain sees a kernel that triggers by ending. torch's inductor may launch its own kernels so too
   (`triton.enable_pdl`, 2.11): behind an operator that it does not know they wait before their first access.
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
