"""Large layers that keep less than all: what is at the ends of recorded steps, without copies, and exact."""

import pytest
import torch
from slothrl_kernels import layer_frame
from slothrl_kernels.decoder_layer import decoder_layer
from slothrl_kernels.graphed_layer import graphed_layer
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_recorder import Rerun
from slothrl_kernels.recorded_layer import addresses, record_layer

from tests.kernels.test_decoder_layer import JOINT, SHAPES, called, case, wanted_of
from tests.kernels.test_graphed_layer import Played, leaves_of, results
from tests.kernels.test_lora_linear import values


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    monkeypatch.setattr(layer_frame, "OPEN", 1)


def assert_equal(ours, eager, bound=2e-6):
    assert len(ours) == len(eager)
    for a, b in zip(ours, eager, strict=True):
        assert (a - b).abs().max() <= bound * max(1, b.abs().max())


class Kept:
    """A keeper that copies: what it was given is nobody's any more."""

    def __init__(self):
        self.packed = self.closed = 0

    def pack(self, x, first=False):
        self.packed += 1
        return x.clone()

    def unpack(self, held):
        return held

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("keep", ["input", "attention", "kept"])
@pytest.mark.parametrize("options", [{}, {"heads_normed": True}, {"rotated": False}, {"biases": True}])
def test_to_the_bit(options, keep):
    """Where no rows are added; with rows to spare nothing of what biases, or longer calls, leave in them."""
    dense = "biases" in options
    tensors, weights = case("dense" if dense else "nf4", JOINT if options == {} else SHAPES)
    tensors = leaves_of(tensors)
    options = {**options, "keep": "input" if keep == "input" else "attention"}
    other = [values(3, 8, 64, seed=3).requires_grad_(), *tensors[1:]]

    def with_keeper(layer):
        return lambda x, parts: layer(x, parts._replace(keeper=Kept()) if keep == "kept" else parts)

    eager = results(decoder_layer, weights, tensors, **options)
    for rows, bound in ((14, 0), (24, 2e-6)):
        played = Played(rows)
        for _ in range(2):
            assert_equal(results(with_keeper(played), weights, tensors, **options), eager, bound)
            assert played.recorded.frame.open
            if rows == 24:
                results(with_keeper(played), weights, other, **options)
        assert played.times == 1
