"""What layers keep in the host's memory, with copies that run as late as their events allow: on a GPU they may."""

import copy
import gc
from functools import partial
from weakref import ref

import pytest
import torch

from slothrl.offload import HostMemory, unpack
from slothrl.pinned_memory import CopyStreams, PinnedPool

LAYERS = 5
CPU = torch.device("cpu")


class LateEvent:
    def __init__(self):
        self.point = None

    def record(self, stream):
        self.point = stream, len(stream.told)

    def synchronize(self):
        if self.point is not None:
            self.point[0].run(self.point[1])


class LateStream:
    """Runs what it was told only when somebody who works at once waits for it; its memory may be gone by then."""

    def __init__(self, at_once=False):
        self.told, self.done, self.at_once = [], 0, at_once

    def wait_event(self, event):
        stream, count = event.point
        if self.at_once:
            stream.run(count)
        else:
            self.told.append(partial(stream.run, count))

    def run(self, count):
        while self.done < count:
            self.done += 1
            self.told[self.done - 1]()


class LateStreams(CopyStreams):
    """Of a CPU, in the place of a GPU's."""

    def __init__(self, device):
        self.device, self.out, self.back = device, LateStream(), LateStream()
        self.main, self._reached = LateStream(at_once=True), LateEvent()

    def event(self):
        return LateEvent()

    def current(self):
        return self.main

    def move(self, stream, pairs):
        stream.told += [partial(copy_if_there, ref(to), ref(source)) for to, source in pairs]

    def pinned(self, nbytes):
        return torch.full((nbytes,), 255, dtype=torch.uint8)


def copy_if_there(to, source):
    assert to() is not None and source() is not None, "memory was given away under a copy"
    to().copy_(source())


def late(layers=LAYERS):
    return HostMemory(layers, smallest=1, streams=LateStreams)


class Graph:
    """What a forward of `LAYERS` layers leaves: inputs, attention's outputs, q, k and v beside each other, raw ones."""

    def __init__(self, host, seed, tokens=6, fails=LAYERS):
        host.begin()
        self.host, self.wanted, self.held, self.seen = host, [], [], []
        generator = torch.Generator().manual_seed(seed)
        for index in range(LAYERS):
            x, out, raw = (torch.randn(tokens, n, generator=generator) for n in (4, 4, 8))
            qkv = torch.randn(tokens, 8, generator=generator).bfloat16()
            keeper = host.keeper(index, x)
            with host.taking(index, keeper) as _:
                q, k, v = (keeper.pack(part) for part in qkv.split((4, 2, 2), 1))
                if index == fails:
                    raise torch.OutOfMemoryError
                held = [keeper.pack(out, first=True), q, k, v, keeper.pack(raw)]
                keeper.close()
                saved = host.taking(index, keeper).pack(x)
            self.wanted.append([x.clone(), out.clone(), *(p.clone() for p in qkv.split((4, 2, 2), 1)), raw.clone()])
            self.seen += [ref(t.untyped_storage()) for t in (x, out, qkv, raw)]
            self.held.append((keeper, saved, held))

    def backward(self, down_to=0):
        for index in reversed(range(down_to, LAYERS)):
            keeper, saved, held = self.held[index]
            found = [unpack(saved), *(keeper.unpack(each) for each in held)]
            assert all(torch.equal(a, b) for a, b in zip(found, self.wanted[index], strict=True))
            assert [x.stride() for x in found[2:5]] == [(8, 1)] * 3  # beside each other, as they lay
            keeper.close()


def pool_of(host) -> PinnedPool:
    return host.pool(CPU)


def test_blocks_serve_from_step_to_step():
    """Of all but the last layer one each: four pieces below 512 bytes, each at a place of its own."""
    host = late()
    for seed in range(4):
        graph = Graph(host, seed)
        assert pool_of(host).nbytes == 4 * 2048 and not host.spare(1)
        graph.backward()
        del graph
        assert host.spare(2048) == [2048] * 4 and host.spare(2049) == []
        assert not host.waiting


@pytest.mark.parametrize(("tokens", "nbytes"), [((6, 40, 6, 40), 4 * (2048 + 8192)), ((40, 6, 40, 6), 4 * 8192)])
def test_other_sizes_take_other_blocks(tokens, nbytes):
    """A block that is larger than needed serves too. 40 tokens: 640, 640, 640 and 1,280 bytes, each in whole 512s."""
    host = late()
    for seed, count in enumerate(tokens):
        graph = Graph(host, seed, tokens=count)
        graph.backward()
        del graph
    assert pool_of(host).nbytes == nbytes
    assert sum(host.spare(1)) == pool_of(host).nbytes


def test_two_graphs_in_any_order():
    host = late()
    Graph(host, 5).backward()
    host = copy.deepcopy(host)
    assert not host._pools and (host.layers, host.smallest) == (LAYERS, 1)
    first, second = Graph(host, 0), Graph(host, 1, tokens=9)
    first.backward()
    second.backward()
    third = Graph(host, 2)
    fourth = Graph(host, 3)
    fourth.backward()
    third.backward()
    third.backward()  # what a second one asks for comes anew


def test_the_device_s_memory_is_let_go():
    """A layer's when the next one sends, the last but one's with the last; the last layer's stays with its graph."""
    host = late()
    graph = Graph(host, 0)
    assert [one() is not None for one in graph.seen] == [False] * 16 + [True] * 4
    assert not host._leaving
    graph.backward()
    del graph


@pytest.mark.parametrize("down_to", range(LAYERS))
def test_a_graph_dropped_halfway(down_to):
    """What was on its way back has arrived before its memory is given away; its blocks are right for the next one."""
    host = late()
    gc.collect()
    gc.disable()
    try:
        graph = Graph(host, 0)
        graph.backward(down_to)
        del graph
        assert sum(host.spare(1)) == pool_of(host).nbytes == 4 * 2048
    finally:
        gc.enable()
    Graph(host, 1)
    Graph(host, 2).backward()
    assert pool_of(host).nbytes == 4 * 2048


@pytest.mark.parametrize("fails", range(LAYERS))
def test_a_forward_that_fails_leaves_nothing(fails):
    host = late()
    with pytest.raises(torch.OutOfMemoryError):
        Graph(host, 0, fails=fails)
    gc.collect()  # the traceback
    assert not host._leaving
    assert not host._pools or sum(host.spare(1)) == pool_of(host).nbytes
    Graph(host, 1).backward()


def test_inputs_alone():
    """Without keepers, in a forward whose last layer never comes: the rest is let go by the backward."""
    host = late(LAYERS + 1)
    host.begin()
    held = []
    for index in range(LAYERS):
        with host.taking(index) as _:
            held.append(host.taking(index).pack(torch.full((3, 2), float(index))))
    assert len(host._leaving) == 1
    for index in reversed(range(LAYERS)):
        assert unpack(held.pop()).tolist() == [[float(index)] * 2] * 3
    assert not host._leaving and sum(host.spare(1)) == pool_of(host).nbytes == LAYERS * 512


def test_what_is_not_moved_stays():
    """Small, strided and whole numbers; a layer's input that is a part of something larger goes alone."""
    host = HostMemory(3, smallest=100, streams=LateStreams)
    host.begin()
    taking = host.taking(0)
    for x in (torch.ones(5), torch.ones(20, 20).T, torch.ones(400, dtype=torch.int64)):
        assert taking.pack(x) is x
    large = torch.arange(400.0)
    keeper = host.keeper(0, large[:200])
    keeper.close()
    assert keeper.sent_input(large[:200]) is None and not host.waiting
    held = host.taking(0, keeper).pack(large[:200])
    assert pool_of(host).nbytes == 1024 and torch.equal(unpack(held), large[:200])
    keeper = host.keeper(1, large)
    assert keeper.sent_input(large) is None  # not sent yet: the layer may run by its modules
    keeper.close()
    assert keeper.sent_input(large).parcel is keeper.parcel and keeper.sent_input(large[:200]) is None


def test_a_small_part_of_a_memory_goes_with_the_whole():
    """k and v beside a q that is moved would hold the memory of all three on the device; and a memory is not read as
    another dtype than it was packed as."""
    host = HostMemory(2, smallest=400)
    keeper = host.keeper(0)
    qkv = torch.arange(128.0).view(4, 32)
    held = [keeper.pack(x) for x in (qkv[:, 30:], qkv[:, 28:30], qkv[:, :28], qkv.view(torch.bfloat16)[:, 8:])]
    small = keeper.pack(torch.ones(99))
    assert len(keeper.parcel.tensors) == 2 and isinstance(small, torch.Tensor) and not host.waiting
    keeper.close()
    assert len(host.waiting[0]) == 1
    back = [keeper.unpack(x) for x in held]
    keeper.close()
    assert torch.equal(torch.cat([back[2], back[1], back[0]], 1), qkv)
    assert back[3].dtype == torch.bfloat16 and torch.equal(back[3].contiguous().view(torch.float32), qkv[:, 4:])


def test_fetched_one_ahead():
    host = HostMemory(4, smallest=1)
    held = [host.taking(i).pack(torch.full((2,), float(i))) for i in range(4)]

    def there(i):
        return held[i].parcel.back[0] is not None

    assert unpack(held[3]).tolist() == [3.0, 3.0] and there(2) and not there(1)
    assert unpack(held[2]).tolist() == [2.0, 2.0] and there(1) and not there(0)
    assert unpack(held[1]).tolist() == [1.0, 1.0] and there(0)
    assert unpack(held[0]).tolist() == [0.0, 0.0]
    assert unpack(held[0]).tolist() == [0.0, 0.0]  # again, for a graph that is kept


def test_fetched_when_it_is_needed():
    """A layer's input has its own q, k and v fetched; those the input of the layer below, but not its q, k and v."""
    host = HostMemory(3, smallest=1)
    xs = [torch.full((2,), float(i)) for i in range(3)]
    keepers = [host.keeper(i, x) for i, x in enumerate(xs)]
    late = [keeper.pack(torch.full((4,), 10.0 + i)) for i, keeper in enumerate(keepers)]
    outputs = [keeper.pack(torch.full((4,), 20.0 + i), first=True) for i, keeper in enumerate(keepers)]
    for keeper in keepers:
        keeper.close()
    inputs = [host.taking(i, keeper).pack(xs[i]) for i, keeper in enumerate(keepers)]

    def there(i):
        assert inputs[i].parcel is outputs[i].parcel is late[i].parcel
        return [inputs[i].parcel.back[held.slot] is not None for held in (inputs[i], outputs[i], late[i])]

    assert unpack(inputs[2]).tolist() == [2.0, 2.0]
    assert there(2) == [False, True, True] and there(1) == [False] * 3  # given, on its way, on its way
    assert keepers[2].unpack(outputs[2]).tolist() == [22.0] * 4
    assert there(2) == [False, False, True] and there(1) == [False] * 3
    assert keepers[2].unpack(late[2]).tolist() == [12.0] * 4 and keepers[2].unpack(outputs[2]).tolist() == [22.0] * 4
    assert there(1) == [True, True, False] and there(0) == [False] * 3
    assert unpack(inputs[1]).tolist() == [1.0, 1.0] and there(1) == [False, True, True]
    assert keepers[1].unpack(late[1]).tolist() == [11.0] * 4 and there(0) == [True, True, False]
    assert sorted(host.waiting) == [0]
