"""What one layer sends to the host's memory together, on its way out and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from slothrl.pinned_memory import PinnedBlock, PinnedPool

if TYPE_CHECKING:
    from slothrl.offload import HostMemory


class Leaving(NamedTuple):
    """Tensors that are being copied to the host until `left`, and the stream that their memory belongs to."""

    index: int
    stream: Any
    left: Any
    tensors: list[Tensor]


class Parcel:
    """What one layer sends together. A part of it is True, what its backward begins with, or False, the rest.

    tensors: (values,) each, on the device until they are sent, and for good where they stay. back: those that have come
    back and were not asked for yet.
    """

    def __init__(self, host: HostMemory, index: int, waiting: Waiting) -> None:
        self.host, self.index, self.waiting = host, index, waiting
        self.tensors: list[Tensor] = []
        self.first: list[bool] = []
        self.back: list[Tensor | None] = []
        self.sent = False
        self.pool: PinnedPool | None = None
        self.block: PinnedBlock | None = None
        self.pinned: list[Tensor] = []
        self._given: set[bool] = set()
        self._coming: set[bool] = set()  # parts whose copies nobody has waited for

    def add(self, flat: Tensor, first: bool) -> int:
        """The slot of a tensor (values,)."""
        self.tensors.append(flat)
        self.first.append(first)
        return len(self.tensors) - 1

    def send(self) -> None:
        """All that was added, once."""
        self.sent = True
        self.back += [None for _ in self.tensors]
        self.host.let_go(before=self.index)
        if not self.tensors:
            return
        self.waiting.setdefault(self.index, []).append(ref(self))
        if self.index >= self.host.layers - self.host.staying:
            return
        self.pool = self.host.pool(self.tensors[0].device)
        if self.pool is None:
            self.tensors = [x.clone() for x in self.tensors]
            return
        layout = [(x.numel(), x.dtype) for x in self.tensors]
        self.block = block = self.pool.take(layout)
        self.pinned, streams = block.pieces(layout), self.pool.streams
        stream = streams.copy(streams.out, zip(self.pinned, self.tensors, strict=True), block.left)
        self.host.hold(Leaving(self.index, stream, block.left, self.tensors))
        self.tensors = []

    def give(self, slot: int) -> Tensor:
        """One tensor (values,) on its device, and what is needed next on its way."""
        if not self.sent:
            return self.tensors[slot]
        self.host.let_go()
        part = self.first[slot]
        if self.back[slot] is None:  # a second backward fetches anew, what it asks for alone
            self._fetch([slot] if part in self._given else self._slots(part), part)
        self._given.add(part)
        self._fetch_what_follows(part)
        if part in self._coming:
            assert self.pool is not None and self.block is not None
            self.pool.streams.current().wait_event(self.block.arrived[part])
            self._coming.remove(part)
        found, self.back[slot] = self.back[slot], None
        assert found is not None
        return found

    def fetch_ahead(self, part: bool) -> None:
        """Start a part's way back, if it is not there, nor was."""
        slots = self._slots(part)
        if part not in self._given and any(self.back[slot] is None for slot in slots):
            self._fetch(slots, part)

    def _slots(self, part: bool) -> list[int]:
        return [slot for slot, first in enumerate(self.first) if first == part]

    def _fetch(self, slots: list[int], part: bool) -> None:
        if self.pool is None or self.block is None:
            for slot in slots:
                self.back[slot] = self.tensors[slot]
            return
        streams, pinned = self.pool.streams, [self.pinned[slot] for slot in slots]
        # Of the current stream's memory, whose earlier work `copy` waits for.
        to = [torch.empty(x.numel(), dtype=x.dtype, device=streams.device) for x in pinned]
        self._coming.add(part)
        streams.copy(streams.back, zip(to, pinned, strict=True), self.block.arrived[part], self.block.left)
        for slot, found in zip(slots, to, strict=True):
            self.back[slot] = found

    def _fetch_what_follows(self, part: bool) -> None:
        """The layer's own rest, where it has one; with that, what the layer below begins with."""
        own = _parcels(self.waiting, self.index)
        if part and not all(all(parcel.first) for parcel in own):
            for parcel in own:
                parcel.fetch_ahead(False)
            return
        self.waiting.pop(self.index, None)
        for parcel in _parcels(self.waiting, self.index - 1):
            parcel.fetch_ahead(True)

    def __del__(self) -> None:
        """The block is for others. Where something was fetched that nobody used, its copy has to end before that: the
        memory it goes to is given away too, and nobody else waits."""
        if self.pool is None or self.block is None:
            return
        for part in self._coming:
            self.block.arrived[part].synchronize()
        self.pool.give_back(self.block)


# What a forward's layers sent, by layer. Not held here: the graph of a forward that failed, or that nobody goes back
# through, takes it along.
Waiting = dict[int, list[ref[Parcel]]]


def _parcels(waiting: Waiting, index: int) -> list[Parcel]:
    return [parcel for held in waiting.get(index, ()) if (parcel := held()) is not None]


class View(NamedTuple):
    """A tensor of a memory that was sent."""

    parcel: Parcel
    slot: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def unpack(held: Any) -> Tensor:
    """A tensor that `_Taking` packed."""
    return held.parcel.give(held.slot).as_strided(*held[2:]) if isinstance(held, View) else held
