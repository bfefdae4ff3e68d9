"""Which tiles the attention kernels run with: sane defaults by head size and shared memory, and measured ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class AttentionLaunch:
    """block_m queries by block_n keys, on `warps` warps, with `stages` tiles in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class AttentionConfig:
    """The launches of the forward, of dQ, and of dK and dV."""

    forward: AttentionLaunch
    query: AttentionLaunch
    key: AttentionLaunch


# By head size padded to a power of two. Data-center cards have 160 KiB of shared memory and more, consumer cards 99.
_LARGE = {
    64: AttentionConfig(
        AttentionLaunch(128, 128, 8, 3), AttentionLaunch(128, 64, 8, 3), AttentionLaunch(64, 128, 8, 3)
    ),
    128: AttentionConfig(
        AttentionLaunch(128, 128, 8, 2), AttentionLaunch(128, 64, 8, 2), AttentionLaunch(64, 128, 8, 2)
    ),
    256: AttentionConfig(AttentionLaunch(128, 64, 8, 1), AttentionLaunch(64, 64, 8, 1), AttentionLaunch(32, 64, 8, 1)),
}
_SMALL = {
    64: AttentionConfig(AttentionLaunch(128, 64, 4, 3), AttentionLaunch(64, 64, 4, 2), AttentionLaunch(64, 64, 4, 2)),
    128: AttentionConfig(AttentionLaunch(64, 64, 4, 2), AttentionLaunch(64, 32, 4, 2), AttentionLaunch(32, 64, 4, 2)),
    256: AttentionConfig(AttentionLaunch(64, 32, 4, 1), AttentionLaunch(32, 32, 4, 1), AttentionLaunch(32, 32, 4, 1)),
}
_TINY, _FLAT = AttentionLaunch(16, 32, 4, 1), AttentionLaunch(32, 32, 4, 1)
_INTERPRETED = AttentionConfig(_TINY, _TINY, _TINY)
_FLOAT32 = AttentionConfig(_FLAT, _FLAT, _FLAT)
# (device name, padded head size) -> the winner of a sweep (tests/gpu/bench_packed_attention.py --sweep prints it).
TUNED: dict[tuple[str, int], AttentionConfig] = {}


def attention_config(device: torch.device, width: int, dtype: torch.dtype) -> AttentionConfig:
    """The launches for heads padded to `width` on `device`; a CPU's are the interpreter's, small."""
    if device.type != "cuda":
        return _INTERPRETED
    if dtype == torch.float32:
        return _FLOAT32
    name, large = _card(device)
    return TUNED.get((name, width)) or (_LARGE if large else _SMALL)[max(64, width)]


@cache
def _card(device: torch.device) -> tuple[str, bool]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.shared_memory_per_block_optin >= 160 << 10
