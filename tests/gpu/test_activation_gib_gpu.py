"""Layers that keep everything within a budget, on a GPU: the same gradients, eagerly and beside recorded layers; the
memory that they take between forward and backward, and what of it shows at the peak.

`pytest tests/gpu/test_activation_gib_gpu.py`: half a minute on an H100.
"""

import pytest
import torch

from slothrl.activations import Activations, keep_activations
from slothrl.fuse import fuse
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of
from tests.gpu.test_fuse_gpu import SHAPES, adapted, step
from tests.gpu.test_graphs_gpu import assert_close, ids_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS, WHOLE, TOKENS = 6, 2, 4096
SHAPES["8b, 6 layers"] = {**SHAPES["8b"], "num_hidden_layers": LAYERS, "vocab_size": 8192}


def kept_in(model) -> Activations:
    return vars(model)["_slothrl_activations"]


def layer_bytes(model, policy):
    """(all that a layer keeps, of which attention; with its input where others' are in the host's memory)."""
    keep_activations(model, "attention")
    sizes = kept_in(model).sizes
    assert sizes.whole and sizes.layers == LAYERS
    inputs = 2 * sizes.hidden if policy in ("offload", "both") else 0
    return TOKENS * (sizes.all_bytes + inputs), TOKENS * (sizes.bytes + inputs)


def held_and_peak(model, ids):
    """Bytes between forward and backward, and the most, beyond those before; of the last of three steps."""
    held = peak = 0
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # the allocator takes note of copies that are done
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")
        held = torch.cuda.memory_allocated() - before
        hidden.sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
        del hidden
    model.zero_grad(set_to_none=True)
    return held, peak


@pytest.fixture(scope="module")
def model():
    made = adapted("8b, 6 layers")
    fuse(made)
    return made


@pytest.fixture(scope="module")
def plain(model):
    """(loss, gradients by name) with layers' inputs kept."""
    keep_activations(model, "layer")
    step(model, ids_of(2, 2048))
    return step(model, ids_of(2, 2048))[:2]


@pytest.mark.parametrize("policy", ["layer", "offload", "both"])
def test_whole_layers_within_a_budget(policy, model, plain):
    """Two of six, eagerly. What they add is what they keep, less what the last layer keeps anyway where the others'
    things are in the host's memory; no more than was said."""
    graph_layers(model, "off")
    ids, (each, attention) = ids_of(2, 2048), layer_bytes(model, policy)
    gib = (WHOLE + 0.5) * each / 2**30
    keep_activations(model, policy)
    without = held_and_peak(model, ids)
    keep_activations(model, policy, gib)
    for _ in range(3):
        found = step(model, ids)
        assert_close(found, plain)
    kept = kept_in(model)
    assert (kept.whole, kept.attending) == (WHOLE, LAYERS - WHOLE if policy == "both" else 0)
    if kept.host is not None:
        assert len(kept.host.spare(1)) == LAYERS - WHOLE
    held, peak = (a - b for a, b in zip(held_and_peak(model, ids), without, strict=True))
    stays = {"layer": 0, "offload": 2 * 4096 * TOKENS, "both": attention}[policy]
    said = f"held {held / 2**20:.0f} MiB more, peak {peak / 2**20:.0f}, {each / 2**20:.0f} a layer"
    assert 0.9 <= held / (WHOLE * each - stays) <= 1.2, said
    assert held <= gib * 2**30, said
    assert peak <= 0.9 * WHOLE * each, (
        said
    )  # they are done when the others are computed again: half to two thirds expected


def test_beside_recorded_layers(model, plain):
    """The other four by graphs, and no buffers for what whole layers keep."""
    ids, (each, _) = ids_of(2, 2048), layer_bytes(model, "both")
    graph_layers(model, "on")
    graphs = graphs_of(model)
    assert graphs is not None
    keep_activations(model, "both", (WHOLE + 0.5) * each / 2**30)
    for _ in range(ARRIVALS + 3):
        assert_close(step(model, ids), plain)
    assert not graphs.stopped and graphs.owned() == []
    assert {kind[1]: len(layers) for kind, layers in graphs.recorded.items()} == {False: LAYERS - WHOLE}
    assert [frame.open for frame in graphs._frames.values()] == [True]
    with_whole, nbytes = held_and_peak(model, ids), graphs.nbytes
    keep_activations(model, "both")
    for _ in range(2):
        assert_close(step(model, ids), plain)
    assert {kind[1]: len(layers) for kind, layers in graphs.recorded.items()} == {False: LAYERS}
    held, peak = (a - b for a, b in zip(with_whole, held_and_peak(model, ids), strict=True))
    said = f"held {held / 2**20:.0f} MiB more, peak {peak / 2**20:.0f}, graphs {nbytes / 2**20:.0f}"
    assert held <= WHOLE * each, said
    assert peak <= (WHOLE + 1.5) * each, said  # eagerly the backward of a whole layer has memory of its own
    graph_layers(model, "off")


def test_all_layers_within_it_are_recorded():
    """Where frame, buffers and attention's outputs fit into the budget; else all run eagerly."""
    small, ids = adapted("0.6b, 4 layers"), ids_of(2, 1000)
    fuse(small)
    keep_activations(small, "layer")
    step(small, ids)
    eager = step(small, ids)
    graph_layers(small, "on")
    graphs = graphs_of(small)
    assert graphs is not None
    keep_activations(small, "all", 0.3)  # 35 KB a token each, 0.26 GiB in all; by recordings 0.35
    for _ in range(ARRIVALS + 2):
        assert_close(step(small, ids), eager)
    assert (kept_in(small).whole, graphs.owned(), len(graphs.recorded)) == (4, [], 0)
    keep_activations(small, "all", 4)
    for _ in range(ARRIVALS + 3):
        assert_close(step(small, ids), eager)
    assert not graphs.stopped and {kind[1]: len(layers) for kind, layers in graphs.recorded.items()} == {True: 4}
    assert 0 < graphs.nbytes < 4 << 30
