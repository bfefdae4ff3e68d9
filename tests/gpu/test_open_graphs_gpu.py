"""Recorded layers with open ends on a GPU: the same gradients as eagerly, and what they hold.

To the bit they are held in `test_graphs_gpu.py`.
"""

import pytest
import torch
from slothrl_kernels import layer_frame

from slothrl.activations import keep_activations
from slothrl.fuse import fuse
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of
from tests.gpu.test_fuse_gpu import adapted, step
from tests.gpu.test_graphs_gpu import assert_close, ids_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("policy", ["layer", "both"])
def test_open_ends_train_the_same_in_about_the_same_memory(policy, monkeypatch):
    """As the same layers with all ends in their steps: recorded steps do without part of what the frame has more."""
    model, ids, held = adapted("8b, 2 layers"), ids_of(2, 2048), []
    fuse(model)
    keep_activations(model, policy)
    step(model, ids)
    eager = step(model, ids)
    for least in (1 << 62, 1):
        monkeypatch.setattr(layer_frame, "OPEN", least)
        graph_layers(model, "on")
        for _ in range(ARRIVALS + 2):
            found = step(model, ids)
            assert_close(found, eager)
        graphs = graphs_of(model)
        assert graphs is not None and not graphs.stopped and len(graphs.recorded) == 1
        assert [frame.open for frame in graphs._frames.values()] == [least == 1]
        held.append(graphs.nbytes + found[2])
    assert held[1] - held[0] <= 300 << 20, held  # 130 expected


@pytest.mark.parametrize("policy", ["layer", "attention"])
def test_rows_to_spare_and_several_sizes(policy, monkeypatch):
    """Two numbers of tokens that are no bucket's share a frame, longer and shorter in turn; an evaluation between."""
    monkeypatch.setattr(layer_frame, "OPEN", 1)
    model, sizes = adapted("0.6b, 4 layers"), [ids_of(2, 1000), ids_of(1, 1201, 1)]
    fuse(model)
    keep_activations(model, policy)
    step(model, sizes[0])
    eager = [step(model, ids) for ids in sizes]
    graph_layers(model, "on")
    for _ in range(ARRIVALS + 3):
        for ids, wanted in zip(sizes, eager, strict=True):
            assert_close(step(model, ids), wanted)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                assert model(input_ids=ids, labels=ids, use_cache=False).loss.item() == pytest.approx(
                    wanted[0], rel=1e-3
                )
    graphs = graphs_of(model)
    assert graphs is not None and not graphs.stopped and len(graphs.recorded) == 2
    assert [frame.open for frame in graphs._frames.values()] == [True]
