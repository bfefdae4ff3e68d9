"""What checkpointed layers keep, on a GPU: the same gradients, and the memory that it takes and frees."""

import gc

import pytest
import torch
from test_fuse_gpu import adapted, step

from slothrl.activations import keep_activations
from slothrl.fuse import fuse
from slothrl.offload import HostMemory, unpack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("policy", ["attention", "offload", "both", "auto", "all"])
def test_what_checkpointed_layers_keep(policy):
    """The same gradients: kept attention is not run again; inputs leave the device and come back as they were."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Attentions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += "attention" in str(operation) and "backward" not in str(operation)
            return operation(*args, **(kwargs or {}))

    model = adapted("0.6b, 4 layers")
    ids = torch.randint(0, 8192, (2, 2000), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    fuse(model)
    step(model, ids)
    plain, again = step(model, ids), step(model, ids)
    keep_activations(model, policy)
    host, pinned = vars(model)["_slothrl_activations"].host, []
    for _ in range(3):  # memory of the host and of both streams is used again
        kept = step(model, ids)
        pinned.append([] if host is None else host.spare(1))
    assert pinned[0] == pinned[1] == pinned[2] and len(pinned[0]) == (3 if policy in ("offload", "both") else 0)
    noise = max((again[1][n] - g).norm() / g.norm() for n, g in plain[1].items())
    # Rank products that are not made together with what was kept come from another GEMM.
    bound = 1e-2 if policy == "all" else 3 * noise + 1e-6
    assert kept[0] == pytest.approx(plain[0], rel=1e-6)
    assert max((kept[1][n] - g).norm() / g.norm() for n, g in plain[1].items()) <= bound
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with Attentions() as seen:
        loss.backward()
    assert seen.count == (4 if policy == "offload" else 0)


@pytest.mark.parametrize(("policy", "fused", "layers"), [("offload", False, 2), ("both", True, 2)])
def test_offloading_frees_what_layers_keep(policy, fused, layers):
    """Between forward and backward the inputs of all layers but the last are gone, and but the embeddings, a leaf; of
    whole layers attention's too, where all but the last layer's would be there."""
    model = adapted("0.6b, 4 layers")
    ids = torch.randint(0, 8192, (1, 4096), device="cuda")
    if fused:
        fuse(model)
    held = {}
    for each in ("layer", policy):
        keep_activations(model, each)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
            torch.cuda.synchronize()
            torch.empty(1, device="cuda")  # the allocator takes note of copies that are done
            held[each] = torch.cuda.memory_allocated()
            hidden.sum().backward()
            del hidden
            model.zero_grad(set_to_none=True)
    last = 4096 * vars(model)["_slothrl_activations"].sizes.bytes if fused else 0  # it stays
    assert held["layer"] - held[policy] >= layers * 4096 * 1024 * 2 - 1.1 * last


LAYERS, ROWS = 5, 1 << 18  # of what goes out: an input and an output of 8 MiB, q, k and v of 16 beside each other
SLEEP = 10_000_000  # cycles, some 5 ms: 10 times what a copy takes


def forward(host, seed, wanted, slow):
    """Layers that keep made-up tensors, whose memory is written over as soon as it is free; copies start late."""
    generator, streams = torch.Generator("cuda").manual_seed(seed), host.pool(torch.device("cuda", 0)).streams
    held = []
    host.begin()
    for index in range(LAYERS):
        x, out = (torch.randn(ROWS, 8, device="cuda", generator=generator) for _ in range(2))
        qkv = torch.randn(ROWS, 32, device="cuda", generator=generator).bfloat16()
        wanted.append([x.clone(), out.clone(), *(part.clone() for part in qkv.split((16, 8, 8), 1))])
        if slow:
            with torch.cuda.stream(streams.out):
                torch.cuda._sleep(SLEEP)
        keeper = host.keeper(index, x)
        with host.taking(index, keeper):
            packed = [keeper.pack(out, first=True), *(keeper.pack(part) for part in qkv.split((16, 8, 8), 1))]
            keeper.close()
        held.append((keeper, [host.taking(index, keeper).pack(x), *packed]))
        assert len(host._leaving) == (index < LAYERS - 1)
        del x, out, qkv
        write_over()
    return held


def backward(host, held, wanted, slow, down_to=0):
    """How many numbers are others than they were, on the device: nobody waits meanwhile."""
    streams = host.pool(torch.device("cuda", 0)).streams
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for index in reversed(range(down_to, LAYERS)):
        keeper, packed = held[index]
        if slow:
            with torch.cuda.stream(streams.back):
                torch.cuda._sleep(SLEEP)
        found = [unpack(packed[0]), *(keeper.unpack(each) for each in packed[1:])]
        for a, b in zip(found, wanted[index], strict=True):
            wrong += (a != b).sum()
        keeper.close()
        del found, a, b
        write_over()
    return wrong


def write_over():
    """Whatever memory of these sizes the allocator has."""
    for nbytes in (8 << 20, 8 << 20, 8 << 20, 16 << 20, 16 << 20):
        torch.empty(nbytes, dtype=torch.uint8, device="cuda").fill_(255)


@pytest.mark.parametrize("slow", [False, True])
def test_copies_are_waited_for(slow):
    """The same bits from step to step, in the same pinned memory, whose copies begin long after they were asked for."""
    host = HostMemory(LAYERS)
    for seed in range(4):
        wanted = []
        held = forward(host, seed, wanted, slow)
        assert backward(host, held, wanted, slow).item() == 0
        assert host.spare(1) == []
        del held
        assert host.spare(1) == [32 << 20] * (LAYERS - 1)


def test_graphs_that_are_dropped_and_two_at_once():
    """What is on its way back when its graph goes, and blocks that others take while a copy into them is not done."""
    host, nothing = HostMemory(LAYERS), []
    held = forward(host, 0, nothing, slow=True)
    backward(host, held, nothing, slow=True, down_to=2)  # the third layer's beginning is on its way
    del held
    assert len(host.spare(1)) == LAYERS - 1
    del nothing[:]
    forward(host, 1, nothing, slow=True)  # nobody goes back through it
    wanted, others = [], []
    first, second = forward(host, 2, wanted, slow=True), forward(host, 3, others, slow=True)
    assert backward(host, first, wanted, slow=True).item() == 0
    assert backward(host, second, others, slow=True).item() == 0
    assert backward(host, first, wanted, slow=False).item() == 0  # a second one
    del first, second
    assert len(host.spare(1)) == 2 * (LAYERS - 1)


def test_a_forward_without_backward_leaves_nothing():
    """The last layer's input and attention stay on the device until then; not until Python's collector comes by."""
    model = adapted("0.6b, 4 layers")
    ids = torch.randint(0, 8192, (1, 4096), device="cuda")
    fuse(model)
    keep_activations(model, "both")
    gc.collect()
    gc.disable()
    try:
        held = []
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
            inside = torch.cuda.memory_allocated()
            del hidden
            torch.cuda.synchronize()
            torch.empty(1, device="cuda")  # the allocator takes note of copies that are done
            held.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert inside - held[-1] >= 4096 * 1024 * 2
    assert held[2] - held[0] < 1 << 20


@pytest.mark.parametrize("policy", ["auto", "all"])
def test_layers_keep_more_where_memory_is_plenty(policy):
    """auto: all four keep attention, far below the length at which it is much of the work; all: everything; as many
    bytes as said."""
    model = adapted("0.6b, 4 layers")
    ids = torch.randint(0, 8192, (1, 4096), device="cuda")
    fuse(model)
    held = {}
    for each in ("layer", policy):
        keep_activations(model, each)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
            held[each] = torch.cuda.memory_allocated()
            hidden.sum().backward()
            del hidden
            model.zero_grad(set_to_none=True)
    kept = vars(model)["_slothrl_activations"]
    assert kept.sizes.whole and (kept.whole, kept.attending) == ((4, 0) if policy == "all" else (0, 4))
    each = kept.sizes.all_bytes if policy == "all" else kept.sizes.bytes
    assert 0.8 <= (held[policy] - held["layer"]) / (4 * 4096 * each) <= 1.3
