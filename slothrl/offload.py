"""What layers keep, in the host's pinned memory between forward and backward; the copies run beside the computation.

What a layer keeps goes out at once, into one piece of memory behind one event, and comes back in two parts: what its
backward begins with, and the rest. The host's time is what counts here: where a GPU waits for launches, it is in the
forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slothrl.parcel import Leaving, Parcel, View, Waiting, unpack
from slothrl.pinned_memory import CopyStreams, PinnedPool, copy_streams

SMALLEST = 1 << 20  # bytes: less is not worth a copy


class HostMemory:
    """What a stack of checkpointed layers keeps, out of the device's memory: their inputs, and more by `keeper`.

    Forward: a layer's tensors are copied on a stream of their own, behind the work that made them. They are held until
    the next layer sends its own, and what the computation does from then on waits for the copy: no more than one
    layer's are on the device, however slow copies are. Nobody may write to them meanwhile.
    Backward: whoever asks for layer i's input has layer i - 1's fetched at the same time. Where a layer has more than
    that, q, k and v come while its MLP is worked on, which does not need them, and what the layer below begins with
    comes while they are: memory is fullest in the MLP.
    Bits do not change. The last layer's stays: the backward begins with it. So do those of all `staying` last layers,
    which keep everything on the device; with the first of them that is asked for the one before comes back.

    Args:
        layers: how many there are.
        smallest: bytes from which on a tensor is moved.
        streams: of a device, or None where its tensors are cloned in the place of being sent.
    """

    def __init__(
        self,
        layers: int,
        smallest: int = SMALLEST,
        streams: Callable[[torch.device], CopyStreams | None] = copy_streams,
    ) -> None:
        self.layers, self.smallest = layers, smallest
        self.staying = 1  # of the last layers, in this forward
        self.waiting: Waiting = {}
        self._streams = streams
        self._pools: dict[torch.device, PinnedPool | None] = {}
        self._leaving: deque[Leaving] = deque()

    def __deepcopy__(self, memo: dict) -> HostMemory:
        """A copy of the model has memory and streams of its own."""
        return memo.setdefault(id(self), HostMemory(self.layers, self.smallest, self._streams))

    def begin(self) -> None:
        """A new forward; what an earlier one left is held by its own graph, for as long as there is one."""
        self.waiting = {}
        self.let_go()

    def taking(self, index: int, keeper: HostKeeper | None = None) -> _Taking:
        """Inside of it, what autograd is given to keep goes to the host as layer `index`'s."""
        return _Taking(self, index, keeper)

    def keeper(self, index: int, x: Tensor | None = None) -> HostKeeper:
        """For what layer `index` keeps of its attention in this forward; its input x (B, S, h) goes with that."""
        return HostKeeper(self, index, x)

    def pool(self, device: torch.device) -> PinnedPool | None:
        if device not in self._pools:
            streams = self._streams(device)
            self._pools[device] = None if streams is None else PinnedPool(streams)
        return self._pools[device]

    def spare(self, nbytes: int) -> list[int]:
        """Sizes of what is pinned already and free, of pieces that have room for `nbytes`."""
        return [size for pool in self._pools.values() if pool is not None for size in pool.spare(nbytes)]

    def hold(self, leaving: Leaving) -> None:
        """Keep what is on its way from being given to others."""
        self._leaving.append(leaving)

    def let_go(self, before: int | None = None) -> None:
        """Give back the device's memory of what layers before `before` sent, or all; its stream waits for the copy."""
        while self._leaving and (before is None or self._leaving[0].index < before):
            leaving = self._leaving.popleft()
            leaving.stream.wait_event(leaving.left)


class _Taking:
    """As `HostMemory.taking` says. A forward that fails in it leaves nothing on its way."""

    def __init__(self, host: HostMemory, index: int, keeper: HostKeeper | None) -> None:
        self.host, self.index, self.keeper, self.waiting = host, index, keeper, host.waiting
        self._hooks: Any = None

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._hooks = None  # it holds `pack`, and so this
        if error[0] is not None:
            self.host.let_go()

    def pack(self, x: Tensor) -> Any:
        if x.nbytes < self.host.smallest or not x.is_floating_point() or not x.is_contiguous():
            return x
        sent = None if self.keeper is None else self.keeper.sent_input(x)
        if sent is not None:
            return sent
        parcel = Parcel(self.host, self.index, self.waiting)
        slot = parcel.add(x.detach().view(-1), first=True)
        parcel.send()
        return View(parcel, slot, x.size(), x.stride(), 0)


class HostKeeper:
    """A `slothrl_kernels.layer_parts.Keeper` in the host's memory.

    Tensors are moved by the memory that they are views of, once: q, k and v lie beside each other, and attention keeps
    the output that its layer keeps too. All of them go when it is closed for the first time.

    Args:
        x: the layer's input, which goes with them; `_Taking` finds it again.
    """

    def __init__(self, host: HostMemory, index: int, x: Tensor | None = None) -> None:
        self.host, self.parcel = host, Parcel(host, index, host.waiting)
        self._slots: dict[tuple[int, torch.dtype], int] = {}  # by address and dtype, until `close`
        self._back: dict[int, Tensor] = {}
        self._input: Any = None
        if x is not None and x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes:
            self._input, self._key = self.pack(x, first=True), (x.data_ptr(), x.dtype, x.size())

    def pack(self, x: Tensor, first: bool = False) -> Any:
        storage, parcel = x.untyped_storage(), self.parcel  # all of it would stay for a small part of it
        if parcel.sent or (nbytes := storage.nbytes()) < self.host.smallest or not x.is_floating_point():
            return x.detach()
        if parcel.tensors and x.device != parcel.tensors[0].device:
            return x.detach()
        if (slot := self._slots.get(key := (storage.data_ptr(), x.dtype))) is None:
            flat = x.detach().as_strided((nbytes // x.element_size(),), (1,), 0)
            self._slots[key] = slot = parcel.add(flat, first)
        parcel.first[slot] |= first
        return View(parcel, slot, x.size(), x.stride(), x.storage_offset())  # pyright: ignore

    def unpack(self, held: Any) -> Tensor:
        if not isinstance(held, View):
            return held
        if held.slot not in self._back:
            self._back[held.slot] = held.parcel.give(held.slot)
        return self._back[held.slot].as_strided(*held[2:])

    def sent_input(self, x: Tensor) -> Any:
        """What stands for x, if that is the layer's input and was sent; to be asked only while that is alive."""
        if not self.parcel.sent or not isinstance(self._input, View):
            return None
        return self._input if (x.data_ptr(), x.dtype, x.size()) == self._key else None

    def close(self) -> None:
        if not self.parcel.sent:
            self.parcel.send()
        self._slots.clear()
        self._back.clear()
