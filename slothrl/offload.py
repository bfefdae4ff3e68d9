"""What layers keep, in the host's pinned memory between forward and backward; the copies run beside the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes: less is not worth a copy


class HostMemory:
    """What a stack of checkpointed layers keeps, out of the device's memory: their inputs, and more by `keeper`.

    Forward: a tensor is copied on a stream of its own, behind the work that made it; the device's memory is free once
    the copy is done. Backward: whoever asks for layer i's input has layer i - 1's fetched at the same time. Where a
    layer has more than that, q, k and v come while its MLP is worked on, which does not need them, and what the layer
    below begins with comes while they are: memory is fullest in the MLP. Bits do not change. The last layer's stays:
    the backward begins with it.

    Args:
        layers: how many there are.
        smallest: bytes from which on a tensor is moved.
    """

    def __init__(self, layers: int, smallest: int = SMALLEST) -> None:
        self.layers, self.smallest = layers, smallest
        self.waiting: Waiting = {}
        self.most = 0  # bytes that one forward has moved out
        self._moving = 0
        self._streams: dict[tuple[torch.device, str], Any] = {}

    def begin(self) -> None:
        """A new forward; what an earlier one left is held by its own graph, for as long as there is one."""
        self.waiting, self._moving = {}, 0

    def taking(self, index: int) -> AbstractContextManager:
        """Inside of it, what autograd is given to keep goes to the host as layer `index`'s."""
        return torch.autograd.graph.saved_tensors_hooks(partial(self._pack, index, self.waiting), self._unpack)

    def keeper(self, index: int) -> HostKeeper:
        """For what layer `index` keeps of its attention in this forward."""
        return HostKeeper(self, index)

    def move(self, index: int, waiting: Waiting, x: Tensor, first: bool = True) -> _Moved:
        moved = _Moved(self, x, waiting, index, stays=index == self.layers - 1, first=first)
        self._moving += x.nbytes if moved.away else 0
        self.most = max(self.most, self._moving)
        waiting.setdefault(index, []).append(ref(moved))
        return moved

    def stream(self, device: torch.device, way: str) -> Any:
        if (device, way) not in self._streams:
            self._streams[device, way] = torch.cuda.Stream(device)
        return self._streams[device, way]

    def _pack(self, index: int, waiting: Waiting, x: Tensor) -> Any:
        if x.nbytes < self.smallest or not x.is_floating_point():
            return x
        return self.move(index, waiting, x)

    def _unpack(self, held: Any) -> Tensor:
        return held.give() if isinstance(held, _Moved) else held


class _Moved:
    """One tensor on its way out and back.

    first: its layer's backward begins with it.
    """

    def __init__(self, host: HostMemory, x: Tensor, waiting: Waiting, index: int, stays: bool, first: bool) -> None:
        self.host, self.device, self.waiting, self.index, self.first = host, x.device, waiting, index, first
        self.away = x.is_cuda and not stays
        self.back: Tensor | None = None
        self.given = False
        self.left: Any = None
        self.arrived: Any = None
        if not self.away:
            self.kept = x.detach() if stays else x.detach().clone()
            return
        self.kept = torch.empty_like(x, device="cpu", pin_memory=True)
        stream = host.stream(x.device, "out")
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.kept.copy_(x.detach(), non_blocking=True)
            self.left = stream.record_event()
        x.record_stream(stream)  # its memory is not given away before it is read

    def fetch_ahead(self) -> None:
        if not self.given:
            self.fetch()

    def fetch(self) -> None:
        """Start the way back, once."""
        if self.back is not None:
            return
        if not self.away:
            self.back = self.kept
            return
        stream = self.host.stream(self.device, "back")
        self.back = torch.empty_like(self.kept, device=self.device)
        # The memory may still be in use by what the current stream was told to do before.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        stream.wait_event(self.left)
        with torch.cuda.stream(stream):
            self.back.copy_(self.kept, non_blocking=True)
            self.arrived = stream.record_event()
        self.back.record_stream(stream)

    def give(self) -> Tensor:
        """The tensor on its device, and what is needed next on its way."""
        self.fetch()
        self.given = True
        own = self._of_layer(self.index)
        if self.first and not all(moved.first for moved in own):
            for moved in own:
                moved.fetch_ahead()
        else:
            self.waiting.pop(self.index, None)
            for moved in self._of_layer(self.index - 1):
                if moved.first:
                    moved.fetch_ahead()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        assert self.back is not None
        back, self.back = self.back, None  # a second backward fetches anew
        return back

    def _of_layer(self, index: int) -> list[_Moved]:
        return [moved for held in self.waiting.get(index, []) if (moved := held()) is not None]


# What a forward's layers moved, by layer. Not held here: the graph of a forward that failed, or that nobody goes back
# through, takes it along.
Waiting = dict[int, list[ref[_Moved]]]


class _View(NamedTuple):
    """A tensor of a memory that was moved."""

    moved: _Moved
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class HostKeeper:
    """A `slothrl_kernels.layer_parts.Keeper` in the host's memory.

    Tensors are moved by the memory that they are views of, once: q, k and v lie beside each other, and attention keeps
    the output that its layer keeps too.
    """

    def __init__(self, host: HostMemory, index: int) -> None:
        self.host, self.index, self.waiting = host, index, host.waiting
        # By address and dtype, with what holds it, until `close`.
        self._moved: dict[tuple[int, torch.dtype], tuple[_Moved, Tensor]] = {}
        self._back: dict[int, Tensor] = {}

    def pack(self, x: Tensor, first: bool = False) -> Any:
        storage = x.untyped_storage()  # all of it would stay for a small part of it
        if storage.nbytes() < self.host.smallest or not x.is_floating_point():
            return x.detach()
        if (key := (storage.data_ptr(), x.dtype)) not in self._moved:
            count = storage.nbytes() // x.element_size()
            flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, 0, (count,), (1,))
            self._moved[key] = self.host.move(self.index, self.waiting, flat, first), flat
        moved = self._moved[key][0]
        moved.first |= first
        return _View(moved, x.size(), x.stride(), int(x.storage_offset()))

    def unpack(self, held: Any) -> Tensor:
        if not isinstance(held, _View):
            return held
        if id(held.moved) not in self._back:
            self._back[id(held.moved)] = held.moved.give()
        return self._back[id(held.moved)].as_strided(held.size, held.stride, held.offset)

    def close(self) -> None:
        self._moved.clear()
        self._back.clear()
