"""Counters for programs that share a sum: the last to arrive adds up, and leaves zeros for the next launch.

CUDA graphs: a buffer a stream, made at the first call outside of a capture; a stream on which nothing ran before gets a
buffer in the graph, zeroed at each replay. Graphs captured on one stream must not be replayed at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTERS = 1 << 16
_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counters(device: torch.device, tiles: int, own: Tensor | None = None) -> Tensor:
    """Zeros (tiles or more,) int32, and zeros again after every launch; `own`, where a caller keeps enough."""
    if own is not None and own.numel() >= tiles:
        return own
    cuda = device.type == "cuda"
    key = (device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)
    if tiles > COUNTERS or (key not in _arrivals and cuda and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    if key not in _arrivals:
        _arrivals[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _arrivals[key]
