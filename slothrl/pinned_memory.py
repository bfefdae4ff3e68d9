"""Pinned memory of the host that is kept from step to step, and the streams on which a GPU copies to it and back.

A block is one piece of memory for all that a layer sends. It is handed out again as soon as nobody has it: copies into
it run one after the other on one stream, behind what the computation was told before, and whoever gives it back has
seen to it that the computation, or the host, waited for each copy out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

GRAIN = 512  # bytes: where a piece may begin, for any dtype and for copies at full speed
Layout = Sequence[tuple[int, torch.dtype]]  # (values, dtype) of each piece


def copy_streams(device: torch.device) -> CopyStreams | None:
    """The streams of a GPU; None for a device from which nothing is copied."""
    return CopyStreams(device) if device.type == "cuda" else None


class CopyStreams:
    """Two streams of one GPU, to the host and back, and the events by which they and others wait for each other.

    An event is recorded anew each time: a wait is for what was recorded when it was asked for (`cudaStreamWaitEvent`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._reached = torch.cuda.Event()

    def event(self) -> Any:
        return torch.cuda.Event()

    def current(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def copy(self, stream: Any, pairs: Iterable[tuple[Tensor, Tensor]], done: Any, *events: Any) -> Any:
        """Copy (to, from) on `stream`, behind `events` and all that the current stream was told so far; record `done`.

        Returns:
            The current stream.
        """
        current = self.current()
        self._reached.record(current)
        for event in (self._reached, *events):
            stream.wait_event(event)
        self.move(stream, pairs)
        done.record(stream)
        return current

    def move(self, stream: Any, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class PinnedBlock:
    """Memory (bytes,) uint8; `left`, an event behind the copies into it; `arrived`, behind those out of each part."""

    def __init__(self, memory: Tensor, streams: CopyStreams) -> None:
        self.memory, self.left = memory, streams.event()
        self.arrived = {True: streams.event(), False: streams.event()}
        self._layout: Layout = ()
        self._pieces: list[Tensor] = []

    def pieces(self, layout: Layout) -> list[Tensor]:
        """A tensor (values,) for each piece; those of the last layout are still there."""
        if self._layout != layout:
            begin, self._layout, self._pieces = 0, layout, []
            for values, dtype in layout:
                end = begin + values * dtype.itemsize
                self._pieces.append(self.memory[begin:end].view(dtype))
                begin = _rounded(end)
        return self._pieces


class PinnedPool:
    """The blocks of one GPU: each is as large as a power of two, to which torch rounds pinned memory up anyway."""

    def __init__(self, streams: CopyStreams) -> None:
        self.streams = streams
        self.nbytes = 0  # of all blocks, in use or not
        self._free: dict[int, list[PinnedBlock]] = {}

    def take(self, layout: Layout) -> PinnedBlock:
        """The smallest free block that has room for the pieces, or a new one."""
        needed = sum(_rounded(values * dtype.itemsize) for values, dtype in layout)
        size = 1 << max(0, needed - 1).bit_length()
        for found in sorted(self._free) if not self._free.get(size) else (size,):
            if found >= size and self._free[found]:
                return self._free[found].pop()
        block = PinnedBlock(self.streams.pinned(size), self.streams)
        self.nbytes += size
        return block

    def give_back(self, block: PinnedBlock) -> None:
        """To be handed out again; no copy out of it may be under way."""
        self._free.setdefault(block.memory.numel(), []).append(block)

    def spare(self, nbytes: int) -> list[int]:
        """Sizes of free blocks that have room for `nbytes`."""
        return [size for size, blocks in self._free.items() if size >= nbytes for _ in blocks]


def _rounded(nbytes: int) -> int:
    return -(-nbytes // GRAIN) * GRAIN
