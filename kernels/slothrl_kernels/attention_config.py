"""Which tiles the attention kernels run with: sane defaults by head size and card, and measured ones."""

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


def _config(*launches: tuple[int, int, int, int]) -> AttentionConfig:
    return AttentionConfig(*(AttentionLaunch(*launch) for launch in launches))  # pyright: ignore[reportCallIssue]


# By head size padded to a power of two; picked by what ptxas spills (Triton 3.6), not yet by time.
HOPPER = {  # wgmma; more than 160 KiB of shared memory, as on an A100
    64: _config((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    128: _config((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    256: _config((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
}
AMPERE = {
    64: _config((128, 128, 8, 3), (128, 64, 8, 3), (32, 128, 8, 2)),
    128: _config((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    256: _config((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
}
CONSUMER = {  # 99 KiB
    64: _config((128, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
    128: _config((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    256: _config((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
_INTERPRETED = _config((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1))
_FLOAT32 = {128: _config(*[(32, 32, 4, 1)] * 3), 256: _config(*[(16, 16, 4, 1)] * 3)}
# (device name, padded head size) -> the winner of a sweep (tests/gpu/bench_packed_attention.py --sweep prints it).
TUNED: dict[tuple[str, int], AttentionConfig] = {}


def attention_config(device: torch.device, width: int, dtype: torch.dtype) -> AttentionConfig:
    """The launches for heads padded to `width` on `device`; a CPU's are the interpreter's, small."""
    if device.type != "cuda":
        return _INTERPRETED
    if dtype == torch.float32:
        return _FLOAT32[max(128, width)]
    name, table = _card(device)
    return TUNED.get((name, width)) or table[max(64, width)]


@cache
def _card(device: torch.device) -> tuple[str, dict[int, AttentionConfig]]:
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < 160 << 10:
        return properties.name, CONSUMER
    return properties.name, HOPPER if properties.major >= 9 else AMPERE
