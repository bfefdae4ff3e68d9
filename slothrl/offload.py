"""Layer inputs in the host's pinned memory between forward and backward; the copies run beside the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes: less is not worth a copy


class HostMemory:
    """The inputs of a stack of checkpointed layers, out of the device's memory.

    Forward: a tensor is copied on a stream of its own, behind the work that made it; the device's memory is free once
    the copy is done. Backward: whoever asks for layer i's has layer i - 1's fetched at the same time. Bits do not
    change. The last layer's stays: the backward begins with it.

    Args:
        layers: how many there are.
        smallest: bytes from which on a tensor is moved.
    """

    def __init__(self, layers: int, smallest: int = SMALLEST) -> None:
        self.layers, self.smallest = layers, smallest
        self.waiting: dict[int, list[_Moved]] = {}  # by layer
        self._streams: dict[torch.device, Any] = {}

    def begin(self) -> None:
        """A new forward; what an earlier one left is still held by its own graph."""
        self.waiting = {}

    def taking(self, index: int) -> AbstractContextManager:
        """Inside of it, what autograd is given to keep goes to the host as layer `index`'s."""
        return torch.autograd.graph.saved_tensors_hooks(partial(self._pack, index, self.waiting), self._unpack)

    def stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _pack(self, index: int, waiting: dict[int, list[_Moved]], x: Tensor) -> Any:
        if x.nbytes < self.smallest or not x.is_floating_point():
            return x
        moved = _Moved(self, x, waiting, index, stays=index == self.layers - 1)
        waiting.setdefault(index, []).append(moved)
        return moved

    def _unpack(self, held: Any) -> Tensor:
        return held.give() if isinstance(held, _Moved) else held


class _Moved:
    """One tensor on its way out and back."""

    def __init__(self, host: HostMemory, x: Tensor, waiting: dict[int, list[_Moved]], index: int, stays: bool) -> None:
        self.host, self.device, self.waiting, self.index = host, x.device, waiting, index
        self.away = x.is_cuda and not stays
        self.back: Tensor | None = None
        self.arrived: Any = None
        if not self.away:
            self.kept = x.detach() if stays else x.detach().clone()
            return
        self.kept = torch.empty_like(x, device="cpu", pin_memory=True)
        stream = host.stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.kept.copy_(x.detach(), non_blocking=True)
        x.record_stream(stream)  # its memory is not given away before it is read

    def fetch(self) -> None:
        """Start the way back, once."""
        if self.back is not None:
            return
        if not self.away:
            self.back = self.kept
            return
        stream = self.host.stream(self.device)
        self.back = torch.empty_like(self.kept, device=self.device)
        # The memory may still be in use by what the current stream was told to do before.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.back.copy_(self.kept, non_blocking=True)
            self.arrived = stream.record_event()
        self.back.record_stream(stream)

    def give(self) -> Tensor:
        """The tensor on its device, and the next one needed on its way."""
        self.fetch()
        self.waiting.pop(self.index, None)
        for below in self.waiting.get(self.index - 1, []):
            below.fetch()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        assert self.back is not None
        back, self.back = self.back, None  # a second backward fetches anew
        return back
