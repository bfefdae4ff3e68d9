"""Layers that keep everything within a budget, beside others of any policy: the same gradients, nothing of them is
computed twice, and their memory is where it was said to be."""

from collections import Counter

import pytest
import torch
from test_activations import attentions_in_backward, checkpointed, loss_of, products_in_backward
from test_fuse import IDS, assert_same, gradients_of, step
from test_graphs import Counting

import slothrl.fuse_layer
from slothrl.activations import Activations, keep_activations, release
from slothrl.fuse import fuse
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of
from slothrl.offload import HostMemory, Parcel
from tests.families import make_checkpoint

LAYERS, POLICIES = 4, ["layer", "offload", "attention", "both", "all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            made[family] = make_checkpoint(family, path, torch.float32, num_hidden_layers=LAYERS)
        return made[family]

    return of


@pytest.fixture
def kinds(monkeypatch):
    """What each layer that ran as one step kept, in the order of the calls."""
    seen, run = [], slothrl.fuse_layer.decoder_layer
    monkeypatch.setattr(
        slothrl.fuse_layer, "decoder_layer", lambda x, parts, **o: seen.append(parts.keep) or run(x, parts, **o)
    )
    return seen


def kept_in(model) -> Activations:
    return vars(model)["_slothrl_activations"]


def gib_of(model, layers, policy="layer"):
    """Of so many whole layers of `IDS`."""
    keep_activations(model, "attention")
    sizes = kept_in(model).sizes
    inputs = 2 * sizes.hidden if policy in ("offload", "both") else 0
    return layers * IDS.numel() * (sizes.all_bytes + inputs) / 2**30


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_nothing_of_whole_layers_is_computed_twice(family, folder, kinds):
    """The last two of four: in their backward is the gradient of the MLP's product, with LoRA's, and no attention."""
    model = checkpointed(folder(family))
    plain = step(model)
    fuse(model)
    for policy in POLICIES:
        keep_activations(model, "layer" if policy == "all" else policy)
        again, attends = products_in_backward(model), attentions_in_backward(model)
        keep_activations(model, policy, gib_of(model, 2.5, policy))
        kinds.clear()
        assert_same(step(model), plain)
        others = "attention" if policy in ("attention", "both", "all") else "input"
        assert kinds == [others, others, "all", "all"]
        assert attentions_in_backward(model) == (2 if others == "input" else 0)
        if policy != "all":
            assert products_in_backward(model) == again // 2 + 2 * 2 < again
            assert attends == (4 if others == "input" else 0)


@pytest.mark.parametrize(("policy", "beside"), [("offload", "layer"), ("both", "attention")])
def test_whole_layers_beside_the_host_s_memory(policy, beside, folder, monkeypatch):
    """Their inputs stay, the other layers' tensors go, and the first of them come back while a whole layer works; bits
    are those of layers that keep all of it on the device."""
    model = checkpointed(folder("qwen3"))
    fuse(model)
    gib = gib_of(model, 2, policy)
    keep_activations(model, beside, gib)
    plain = step(model)
    keep_activations(model, policy, gib)
    kept_in(model).host = HostMemory(LAYERS, smallest=1)
    sent, asked, send, give, ahead = [], [], Parcel.send, Parcel.give, Parcel.fetch_ahead

    def sending(self):
        before = [x.data_ptr() for x in self.tensors]
        send(self)
        sent.append((self.index, before != [x.data_ptr() for x in self.tensors], len(before) > 1))

    monkeypatch.setattr(Parcel, "send", sending)
    monkeypatch.setattr(Parcel, "give", lambda self, slot: asked.append(("asked", self.index)) or give(self, slot))
    monkeypatch.setattr(
        Parcel, "fetch_ahead", lambda self, part: asked.append(("ahead", self.index)) or ahead(self, part)
    )
    ours = step(model)
    assert torch.equal(ours[0], plain[0]) and all(torch.equal(ours[1][n], g) for n, g in plain[1].items())
    both = policy == "both"
    assert sent == [(0, True, both), (1, True, both), (2, False, False), (3, False, False)]
    assert kept_in(model).host.waiting == {}
    assert asked.index(("asked", 2)) < asked.index(("ahead", 1)) < asked.index(("asked", 1))


def test_on_a_gpu_it_is_within_what_is_left(folder, monkeypatch):
    """Of four layers two are asked for; where nothing is left none is. What is pinned already for the others serves."""
    model = checkpointed(folder("llama"))
    fuse(model)
    keep_activations(model, "both", gib_of(model, 2, "both"))
    kept, asked = kept_in(model), []
    needed = IDS.numel() * (kept.sizes.bytes + 2 * kept.sizes.hidden)
    monkeypatch.setattr("slothrl.activations.free_of_host", lambda: asked.append(1) or 0)
    for left, pinned, layers, times in ((1 << 30, 2, (2, 2), 0), (1 << 30, 1, (2, 0), 1), (0, 3, (0, 4), 1)):
        monkeypatch.setattr(kept, "_room", lambda *_, left=left: (1 << 30, left, 0))
        monkeypatch.setattr(kept.host, "spare", lambda nbytes, pinned=pinned: [needed] * pinned)
        assert kept._how_many(IDS.numel(), 13, torch.device("cuda")) == layers and len(asked) == times


def test_two_graphs_an_evaluation_and_a_second_backward(folder):
    model = checkpointed(folder("llama"))
    fuse(model)
    others = (3 * IDS + 1) % 1000
    _, plain = step(model)
    loss_of(model, others).backward()
    both = gradients_of(model)
    keep_activations(model, "both", gib_of(model, 1, "both"))
    kept_in(model).host = HostMemory(LAYERS, smallest=1)
    model.zero_grad()
    first, second = loss_of(model), loss_of(model, others)
    with torch.no_grad():
        loss_of(model.eval())
    model.train()
    first.backward(retain_graph=True)
    second.backward()
    assert_close(gradients_of(model), both)
    model.zero_grad()
    first.backward()
    assert_close(gradients_of(model), plain)


def assert_close(ours, theirs):
    largest = max(g.abs().max() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    assert all((ours[n] - g).abs().max() <= 1e-5 * largest for n, g in theirs.items())


def test_recordings_are_of_the_other_layers(folder, kinds):
    """A few whole layers run eagerly, and hold no buffers; all of them by recordings where these fit the budget."""
    model = checkpointed(folder("llama"))
    plain, recorder = step(model), Counting()
    fuse(model)
    graph_layers(model, "on", recorder)
    graphs = graphs_of(model)
    assert graphs is not None

    def trained(policy, gib, turns=ARRIVALS + 2):
        keep_activations(model, policy, gib)
        for _ in range(turns):
            recorder.replays = 0
            kinds.clear()
            assert_same(step(model), plain)
        return Counter(kinds), recorder.replays, {k[1]: len(layers) for k, layers in graphs.recorded.items()}

    assert trained("layer", gib_of(model, 1)) == ({"all": 1}, 3 * 5, {False: 3}) and graphs.owned() == []
    assert trained("attention", gib_of(model, 4)) == ({"all": 4}, 0, {False: 3}) and graphs.owned() == []
    needed = []
    graphs._kept_bytes, count = lambda *given: needed.append(count(*given)) or needed[-1], graphs._kept_bytes
    trained("all", gib_of(model, 4), turns=1)
    taken = graphs.nbytes
    assert trained("all", (max(needed) - 1) / 2**30)[0] == {"all": 4} and graphs.owned() == []
    found, replays, kinds_recorded = trained("all", max(needed) / 2**30)
    assert (found, replays, kinds_recorded) == ({}, 4 * 4, {False: 3, True: 4})
    outputs = 4 * 32 * 128 * 4  # of attention, 32 rows of float32, which autograd holds
    assert 0.9 < (graphs.nbytes - taken + outputs) / max(needed) <= 1.1
    release(model)
    assert graphs.most is None


def test_words_and_mistakes(folder):
    model = checkpointed(folder("llama"))
    assert "does nothing: no layer is one step" in keep_activations(model, "both", 1)[0][1]
    assert step(model)[1]
    assert (kept_in(model).whole, kept_in(model).attending) == (0, LAYERS)
    fuse(model)
    assert keep_activations(model, "layer", 0.4) == [
        ("activations", "layer inputs; everything of as many of the last layers as fit into 0.4 GiB (activation_gib)")
    ]
    assert "fit into at most 2 GiB" in keep_activations(model, "auto", 2)[0][1]
    assert keep_activations(model, "layer", None) == [("activations", "layer inputs")]
    assert "_slothrl_activations" not in vars(model)
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="activation_gib"):
            keep_activations(model, "layer", wrong)
