"""What checkpointed layers keep changes no gradient: kept attention is not run again, inputs come from the host."""

from collections import Counter

import pytest
import torch
from slothrl_kernels import PackedLayout
from test_fuse import IDS, adapted, assert_same, folders, step  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from slothrl.activations import Activations, keep_activations, release
from slothrl.fuse import fuse
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


@pytest.mark.parametrize(("family", "raw"), [("llama", 0), ("qwen3", 1)])
def test_attention_in_the_host_s_memory(family, raw, folders, monkeypatch):  # noqa: F811
    """The gradients are the bits of what stays on the device, and no memory is moved twice: queries, attention's output
    before and after its heads lie token by token, the layer's input; with norms q, k and v before them, beside each
    other. Keys and values are smaller than what is moved here."""
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
    assert Counter(moved) == {(i, 2 * 13 * n): count for i in (0, 1) for n, count in ((128, 4), (256, raw)) if count}
    assert kept.host.waiting == {} and attentions_in_backward(model) == 0


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
    assert kept._how_many(4096, 4096, torch.device("cpu")) == 0  # nothing is measured there
    fuse(model)
    assert kept.sizes.whole and kept.sizes.bytes > sizes.bytes  # q, k and v, too


def test_a_pack_is_judged_by_its_longest_sequence(folders, monkeypatch):  # noqa: F811
    """4,096 tokens of 64 sequences attend no further than 64 do."""
    model = checkpointed(folders("llama"))
    keep_activations(model, "attention")
    kept: Activations = vars(model)["_slothrl_activations"]
    asked = []
    monkeypatch.setattr(kept, "_how_many", lambda tokens, reach, device: asked.append((tokens, reach)) or 0)
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
