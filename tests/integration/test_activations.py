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
from slothrl.offload import HostMemory, Parcel


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


def seen_leaving(monkeypatch):
    """What is sent from here on: weak references, layers, and how many values each of their tensors has."""
    seen, send = [], Parcel.send

    def sending(self):
        seen.append((ref(self), self.index, [x.numel() for x in self.tensors]))
        send(self)

    monkeypatch.setattr(Parcel, "send", sending)
    return seen


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
    moved = seen_leaving(monkeypatch)
    ours = step(model)
    assert [(index, sizes) for _, index, sizes in moved] == [(0, [2 * 13 * 128]), (1, [2 * 13 * 128])]
    assert torch.equal(ours[0], plain[0]) and all(torch.equal(ours[1][n], g) for n, g in plain[1].items())
    assert kept.host.waiting == {}
    keep_activations(model, "both")
    assert_same(step(model), plain)
    assert attentions_in_backward(model) == 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_in_the_host_s_memory(family, folders, monkeypatch):  # noqa: F811
    """The gradients are the bits of what stays on the device, a layer's tensors go together, and no memory is moved
    twice: queries, attention's output
    before and after its heads lie token by token, the layer's input; values with what they lie beside, q, k and v
    before norms and rotation. Keys, which have a memory of their own here, are smaller than what is moved."""
    model = checkpointed(folders(family))
    fuse(model)
    keep_activations(model, "attention")
    plain = step(model)
    keep_activations(model, "both")
    kept: Activations = vars(model)["_slothrl_activations"]
    kept.host = HostMemory(3, smallest=2 * 13 * 128 * 4)  # no third layer comes: both are moved
    moved = seen_leaving(monkeypatch)
    ours = step(model)
    assert torch.equal(ours[0], plain[0]) and all(torch.equal(ours[1][n], g) for n, g in plain[1].items())
    assert [index for _, index, _ in moved] == [0, 1]
    assert all(Counter(sizes) == {2 * 13 * 128: 4, 2 * 13 * 256: 1} for _, _, sizes in moved)
    assert kept.host.waiting == {} and attentions_in_backward(model) == 0


def in_the_host(model, monkeypatch, **options):
    """`both`, and all that it moves, as `seen_leaving` says."""
    keep_activations(model, "both")
    vars(model)["_slothrl_activations"].host = HostMemory(3, **options)
    return seen_leaving(monkeypatch)


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_forwards_in_any_order(family, folders, monkeypatch):  # noqa: F811
    """Two graphs at once, a forward for evaluation between a forward and its backward, a second backward, a forward
    inside of others' hooks: the gradients of what stays on the device."""
    model = checkpointed(folders(family))
    fuse(model)
    keep_activations(model, "attention")
    others = (3 * IDS + 1) % 1000
    _, plain = step(model)
    loss_of(model, others).backward()
    both = gradients_of(model)
    moved = in_the_host(model, monkeypatch, smallest=1)
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
    moved = in_the_host(model, monkeypatch, smallest=1)
    loss_of(model).backward()
    assert [len(sizes) > 4 for *_, sizes in moved] == [True] * 2
    assert not any(one() for one, *_ in moved)  # once there, all of it has been given back
    gc.collect()
    gc.disable()
    try:
        first = loss_of(model)
        loss_of(model)
        del first
        assert not any(one() for one, *_ in moved)
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
    gc.collect()  # pytest holds the traceback in a cycle
    assert len(moved) > count and not any(one() for one, *_ in moved)


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


def test_what_is_pinned_already_is_not_asked_for(folders, monkeypatch):  # noqa: F811
    """Of two layers one is sent."""
    model = checkpointed(folders("llama"))
    fuse(model)
    keep_activations(model, "both")
    kept: Activations = vars(model)["_slothrl_activations"]
    asked, pinned = [], [0]
    monkeypatch.setattr("slothrl.activations.free_of_host", lambda: asked.append(1) or 0)
    monkeypatch.setattr(kept.host, "spare", lambda nbytes: [size for size in pinned if size >= nbytes])
    needed = 100 * (kept.sizes.bytes + 2 * 128)
    for pinned[0], layers, times in ((needed, 2, 0), (needed - 1, 0, 1)):
        assert kept._how_many(100, 100, torch.device("cuda")) == (0, layers) and len(asked) == times


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
