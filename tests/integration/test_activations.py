"""What checkpointed layers keep changes no gradient: kept attention is not run again, inputs come from the host."""

import gc
from collections import Counter
from weakref import ref

import pytest
import torch
from slothrl_kernels import PackedLayout
from test_fuse import IDS, adapted, assert_same, folders, gradients_of, step  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from slothrl.activations import Activations, keep_activations, release
from slothrl.fuse import fuse
from slothrl.fuse_layer import Attend
from slothrl.kept_attention import WORTH
from slothrl.offload import HostMemory


class Attentions(TorchDispatchMode):
    """Counts torch's attention operations, forward ones."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += "attention" in str(operation) and "backward" not in str(operation)
        return operation(*args, **(kwargs or {}))


def checkpointed(folder, **lora):
    model = adapted(folder, **lora)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def attentions_in_backward(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    with Attentions() as seen:
        loss.backward()
    return seen.count


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_is_kept_and_not_run_again(family, fused, folders):  # noqa: F811
    model = checkpointed(folders(family), lora_dropout=0.1)
    plain = step(model)
    assert attentions_in_backward(model) == 2
    if fused:
        fuse(model)
    assert keep_activations(model, "attention") == [
        ("activations", "layer inputs and attention outputs, as far as they fit")
    ]
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})  # as trainers do when they start
    assert_same(step(model), plain)
    assert attentions_in_backward(model) == 0
    release(model)
    assert attentions_in_backward(model) == 2
    assert "_slothrl_activations" not in vars(model)


class Products(TorchDispatchMode):
    """Counts matrix products, and LoRA's added to them, as wide as gate or up, or as both beside each other."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.count = columns, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        made = getattr(found, "shape", ())
        self.count += "mm" in str(operation) and made in [(IDS.numel(), n * self.columns) for n in (1, 2)]
        return found


def products_in_backward(model):
    loss = loss_of(model)
    with Products(model.config.intermediate_size) as seen:
        loss.backward()
    return seen.count


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_nothing_is_computed_twice(family, folders):  # noqa: F811
    """Of the MLP's GEMMs in the backward only the gradient of its product is left, one a layer, with LoRA's; unfused
    layers keep attention."""
    model = checkpointed(folders(family))
    keep_activations(model, "all")
    plain = step(model)
    kept: Activations = vars(model)["_slothrl_activations"]
    assert (kept.whole, kept.attending) == (0, 2)
    fuse(model)
    keep_activations(model, "attention")
    assert_same(step(model), plain)
    again = products_in_backward(model)
    keep_activations(model, "all")
    assert_same(step(model), plain)
    kept = vars(model)["_slothrl_activations"]
    assert (kept.whole, kept.attending) == (2, 0)
    assert attentions_in_backward(model) == 0
    assert (products_in_backward(model), again) == (2 * 2, 2 * (4 if family == "phi3" else 6))


@pytest.mark.parametrize("layers", [2, 3])
def test_inputs_in_the_host_s_memory(layers, folders, monkeypatch):  # noqa: F811
    """All but the last layer's go out, each comes back while the one above works; gradients are the same bits."""
    model = checkpointed(folders("llama"))
    plain = step(model)
    keep_activations(model, "offload")
    kept: Activations = vars(model)["_slothrl_activations"]
    kept.host = HostMemory(layers, smallest=1)  # of three layers the third never comes, and both of these are moved
    moved = []
    pack = HostMemory._pack
    monkeypatch.setattr(
        HostMemory, "_pack", lambda self, i, waiting, x: moved.append((i, tuple(x.shape))) or pack(self, i, waiting, x)
    )
    ours = step(model)
    assert moved == [(0, (2, 13, 128)), (1, (2, 13, 128))]
    assert torch.equal(ours[0], plain[0]) and all(torch.equal(ours[1][n], g) for n, g in plain[1].items())
    assert kept.host.waiting == {}
    keep_activations(model, "both")
    assert_same(step(model), plain)
    assert attentions_in_backward(model) == 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_in_the_host_s_memory(family, folders, monkeypatch):  # noqa: F811
    """The gradients are the bits of what stays on the device, and no memory is moved twice: queries, attention's output
    before and after its heads lie token by token, the layer's input; values with what they lie beside, q, k and v
    before norms and rotation. Keys, which have a memory of their own here, are smaller than what is moved."""
    model = checkpointed(folders(family))
    fuse(model)
    keep_activations(model, "attention")
    plain = step(model)
    keep_activations(model, "both")
    kept: Activations = vars(model)["_slothrl_activations"]
    kept.host = HostMemory(3, smallest=2 * 13 * 128 * 4)  # no third layer comes: both are moved
    moved, move = [], HostMemory.move
    monkeypatch.setattr(
        HostMemory,
        "move",
        lambda self, i, waiting, x, *n: moved.append((i, x.numel())) or move(self, i, waiting, x, *n),
    )
    ours = step(model)
    assert torch.equal(ours[0], plain[0]) and all(torch.equal(ours[1][n], g) for n, g in plain[1].items())
    assert Counter(moved) == {(i, 2 * 13 * n): count for i in (0, 1) for n, count in ((128, 4), (256, 1))}
    assert kept.host.waiting == {} and attentions_in_backward(model) == 0


def in_the_host(model, **options):
    """`both`, and weak references to all that it moves."""
    keep_activations(model, "both")
    kept: Activations = vars(model)["_slothrl_activations"]
    kept.host, moved = HostMemory(3, **options), []
    move = kept.host.move

    def seen(*arguments, **named):
        found = move(*arguments, **named)
        moved.append(ref(found))
        return found

    kept.host.move = seen
    return moved


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_forwards_in_any_order(family, folders):  # noqa: F811
    """Two graphs at once, a forward for evaluation between a forward and its backward, a second backward, a forward
    inside of others' hooks: the gradients of what stays on the device."""
    model = checkpointed(folders(family))
    fuse(model)
    keep_activations(model, "attention")
    others = (3 * IDS + 1) % 1000
    _, plain = step(model)
    loss_of(model, others).backward()
    both = gradients_of(model)
    moved = in_the_host(model, smallest=1)
    model.zero_grad()
    first, second = loss_of(model), loss_of(model, others)
    with torch.no_grad():
        loss_of(model.eval())
    model.train()
    first.backward()
    second.backward()
    assert all(torch.equal(g, both[n]) for n, g in gradients_of(model).items())
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model)
    loss.backward(retain_graph=True)
    once, count = gradients_of(model), len(moved)
    assert all(torch.equal(g, plain[n]) for n, g in once.items())
    loss.backward(retain_graph=True)
    assert all(torch.equal(g, 2 * plain[n]) for n, g in gradients_of(model).items())
    assert len(moved) == count  # attention runs again, and nothing of it is put away a second time


def test_what_was_moved_goes_with_its_graph(folders, monkeypatch):  # noqa: F811
    """A loss that nobody goes back through, and a forward that fails, leave nothing: on a GPU it is pinned memory, and
    of the last layer the device's. No garbage collector is needed."""
    model = checkpointed(folders("qwen3"))
    fuse(model)
    moved = in_the_host(model, smallest=1)
    loss_of(model).backward()
    assert len(moved) > 2 * 4 and not any(one() for one in moved)  # once there, all of it has been given back
    gc.collect()
    gc.disable()
    try:
        first = loss_of(model)
        loss_of(model)
        del first
        assert not any(one() for one in moved)
        attend, calls, count = Attend.__call__, [], len(moved)

        def fails(self, *heads):
            calls.append(self)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("in the second layer")
            return attend(self, *heads)

        monkeypatch.setattr(Attend, "__call__", fails)
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model)
    finally:
        gc.enable()
    monkeypatch.undo()
    gc.collect()  # pytest holds the traceback in a cycle
    assert len(moved) > count and not any(one() for one in moved)


def test_a_small_part_of_a_memory_goes_with_the_whole():
    """k and v beside a q that is moved would hold the memory of all three on the device; and a memory is not read as
    another dtype than it was packed as."""
    host = HostMemory(2, smallest=400)
    keeper = host.keeper(0)
    qkv = torch.arange(128.0).view(4, 32)
    held = [keeper.pack(x) for x in (qkv[:, 30:], qkv[:, 28:30], qkv[:, :28], qkv.view(torch.bfloat16)[:, 8:])]
    small = keeper.pack(torch.ones(99))
    assert len(host.waiting[0]) == 2 and isinstance(small, torch.Tensor)
    back = [keeper.unpack(x) for x in held]
    keeper.close()
    assert torch.equal(torch.cat([back[2], back[1], back[0]], 1), qkv)
    assert back[3].dtype == torch.bfloat16 and torch.equal(back[3].contiguous().view(torch.float32), qkv[:, 4:])


def test_fetched_one_ahead():
    host = HostMemory(4, smallest=1)
    held = [host._pack(i, host.waiting, torch.full((2,), float(i))) for i in range(4)]
    assert host._unpack(held[3]).tolist() == [3.0, 3.0] and held[2].back is not None and held[1].back is None
    assert host._unpack(held[2]).tolist() == [2.0, 2.0]
    assert held[1].back is not None and held[0].back is None
    assert host._unpack(held[1]).tolist() == [1.0, 1.0] and held[0].back is not None
    assert host._unpack(held[0]).tolist() == [0.0, 0.0]
    assert host._unpack(held[0]).tolist() == [0.0, 0.0]  # again, for a graph that is kept


def test_fetched_when_it_is_needed():
    """A layer's input has its own q, k and v fetched; those the input of the layer below, but not its q, k and v."""
    host = HostMemory(3, smallest=1)
    keepers = [host.keeper(i) for i in range(3)]
    inputs = [host._pack(i, host.waiting, torch.full((2,), float(i))) for i in range(3)]
    late = [keeper.pack(torch.full((4,), 10.0 + i)) for i, keeper in enumerate(keepers)]
    outputs = [keeper.pack(torch.full((4,), 20.0 + i), first=True) for i, keeper in enumerate(keepers)]

    def there(i):
        return [held.back is not None for held in (inputs[i], outputs[i].moved, late[i].moved)]

    assert host._unpack(inputs[2]).tolist() == [2.0, 2.0]
    assert there(2) == [False, True, True] and there(1) == [False] * 3  # given, on its way, on its way
    assert keepers[2].unpack(outputs[2]).tolist() == [22.0] * 4
    assert there(2) == [False, False, True] and there(1) == [False] * 3
    assert keepers[2].unpack(late[2]).tolist() == [12.0] * 4 and keepers[2].unpack(outputs[2]).tolist() == [22.0] * 4
    assert there(1) == [True, True, False] and there(0) == [False] * 3
    assert host._unpack(inputs[1]).tolist() == [1.0, 1.0] and there(1) == [False, True, True]
    assert keepers[1].unpack(late[1]).tolist() == [11.0] * 4 and there(0) == [True, True, False]
    assert sorted(host.waiting) == [0]


def test_auto_keeps_attention_where_it_is_much(folders):  # noqa: F811
    """The share by hand: a layer of 128 x 128 + 2 x 128 x 64 + 128 x 128 + 3 x 128 x 256 weights, width 128."""
    model = checkpointed(folders("llama"))
    assert "30% of the work" in keep_activations(model, "auto")[0][1]
    kept: Activations = vars(model)["_slothrl_activations"]
    layer, sizes = kept.layers[0], kept.sizes
    weights = sum(m.in_features * m.out_features for m in layer.modules() if type(m) is torch.nn.Linear)
    assert (sizes.layers, sizes.width, sizes.weights, sizes.whole) == (2, 128, weights, False)
    assert sizes.share(1000) == pytest.approx(256000 / (256000 + 2 * weights))
    assert sizes.share(8) < WORTH < sizes.share(4096)
    assert kept._how_many(4096, 4096, torch.device("cpu")) == (0, 0)  # nothing is measured there
    fuse(model)
    assert kept.sizes.whole and kept.sizes.bytes > sizes.bytes  # q, k and v, too
    assert (sizes.rest, kept.sizes.rest) == (0, 128 + 2 * 256)  # the sum after attention, gate and up


def test_layers_that_run_by_their_modules_are_counted_so(folders):  # noqa: F811
    """Fused, but watched: what they keep of attention stays on the device, whose memory then is what counts."""
    model = checkpointed(folders("llama"))
    fuse(model)
    keep_activations(model, "both")
    kept: Activations = vars(model)["_slothrl_activations"]
    assert kept.sizes.whole and kept.sizes.numbers == 128 + 256
    handle = kept.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not kept.sizes.whole and kept.sizes.numbers == 128
    handle.remove()
    assert kept.sizes.whole


def test_a_pack_is_judged_by_its_longest_sequence(folders, monkeypatch):  # noqa: F811
    """4,096 tokens of 64 sequences attend no further than 64 do."""
    model = checkpointed(folders("llama"))
    keep_activations(model, "attention")
    kept: Activations = vars(model)["_slothrl_activations"]
    asked = []
    monkeypatch.setattr(kept, "_how_many", lambda tokens, reach, device: asked.append((tokens, reach)) or (0, 0))
    layout = PackedLayout.build([10, 54, 54, 7], [-1, 0, 0, -1])
    decoder = model.get_base_model().model
    kept._before_forward(decoder, (), {"input_ids": torch.zeros(1, 125), "packed_layout": layout})
    kept._before_forward(decoder, (), {"input_ids": torch.zeros(2, 30)})
    assert asked == [(125, 64), (60, 30)]


def test_reentrant_checkpointing_and_others_stay(folders):  # noqa: F811
    model = adapted(folders("llama"))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    plain = step(model)
    keep_activations(model, "offload")
    assert_same(step(model), plain)
    layers = model.get_base_model().model.layers
    assert all(type(layer._gradient_checkpointing_func).__name__ == "partial" for layer in layers)
    assert "no layers" in keep_activations(torch.nn.Linear(2, 2), "auto")[0][1]
    with pytest.raises(ValueError, match="policy"):
        keep_activations(model, "some")
