"""Large layers that keep less than all: what is at the ends of recorded steps, without copies, and exact."""

import pytest
import torch
from slothrl_kernels import layer_frame
from slothrl_kernels.decoder_layer import decoder_layer
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_recorder import Rerun
from slothrl_kernels.recorded_layer import record_layer

from tests.kernels import test_graphed_layer as closed
from tests.kernels.test_decoder_layer import JOINT, SHAPES, called, case, in_tiles, wanted_of
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


@pytest.mark.parametrize(
    "test",
    [
        closed.test_fewer_tokens_after_more,
        closed.test_several_forwards_before_the_backwards,
        closed.test_one_recording_whether_attention_is_kept_or_not,
        closed.test_adapters_are_read_where_they_are,
    ],
)
def test_as_with_ends_in_steps(test):
    test()


def test_projections_without_adapters():
    """Of o and down alone, and of q, k, v, gate and up alone: rank products of no columns."""
    tensors, weights = case("nf4")
    tensors = leaves_of(tensors)
    for without in ((7, 8, 13, 14), (1, 2, 3, 4, 5, 6, 9, 10, 11, 12)):
        some = [None if i in without else t for i, t in enumerate(tensors)]
        assert_equal(results(Played(14), weights, some), results(decoder_layer, weights, some), 0)


@pytest.mark.parametrize("keep", ["input", "attention"])
def test_what_was_not_finite_is_gone(keep):
    """Zero times NaN is NaN: rows beyond the tokens hold nothing of a longer call that went wrong."""
    tensors, weights = case("nf4")
    tensors, played, options = leaves_of(tensors), Played(24), {"biases": True, "heads_normed": True, "keep": keep}
    broken = values(3, 8, 64, seed=3)
    broken[1:, 4:] = float("nan")
    assert results(played, weights, [broken.requires_grad_(), *tensors[1:]], **options)[2].isnan().any()
    assert_equal(results(played, weights, tensors, **options), results(decoder_layer, weights, tensors, **options))


def test_evaluation_between_and_a_second_backward():
    """Nothing that a backward needs is in the frame; what was given out is nobody else's."""
    tensors, weights = case("nf4")
    tensors, played = leaves_of(tensors), Played(32)
    other = [values(1, 29, 64, seed=6), *tensors[1:]]
    upstream, wanted = values(2, 7, 64, seed=20), [tensors[i] for i in wanted_of(tensors)]
    for keep in ("attention", "input"):
        eager = results(decoder_layer, weights, tensors, keep=keep)
        y = called(played, weights, keep=keep)(*tensors)
        with torch.no_grad():
            assert_equal([called(played, weights)(*other)], [called(decoder_layer, weights)(*other)])
        assert_equal([y, *torch.autograd.grad(y, wanted, upstream, retain_graph=True)], eager)
        first = torch.autograd.grad(y, wanted, upstream, retain_graph=True)
        before = [t.clone() for t in (y, *first)]
        results(played, weights, [values(2, 8, 64, seed=9).requires_grad_(), *tensors[1:]])
        assert all(torch.equal(a, b) for a, b in zip((y, *first), before, strict=True))
        assert_equal([y, *torch.autograd.grad(y, wanted, upstream)], eager)


def test_an_mlp_in_tiles(monkeypatch):
    in_tiles(monkeypatch)
    tensors, weights = case("nf4")
    tensors = leaves_of(tensors)
    assert_equal(results(Played(14), weights, tensors), results(decoder_layer, weights, tensors), 0)


def test_half_precision_adapters_in_float32():
    """Gradients come in the adapters' dtype, though the steps compute them in the layer's."""
    tensors, weights = case("nf4")
    tensors = leaves_of(tensors)
    tensors[0] = tensors[0].detach().bfloat16().requires_grad_()
    ours, eager = (results(f, weights, tensors, keep="attention") for f in (Played(14), decoder_layer))
    assert [t.dtype for t in ours] == [t.dtype for t in eager] and ours[2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_which_frames_are_open(monkeypatch):
    """Small calls, layers of four norms and those that keep all have another kind; several sizes share one."""
    tensors, weights = case("nf4")
    tensors = leaves_of(tensors)
    results(played := Played(32), weights, tensors)
    parts, frame, x = played.parts, played.recorded.frame, tensors[0]
    assert record_layer(parts, frame, 16, Rerun()).frame is frame
    monkeypatch.setattr(layer_frame, "OPEN", 32 * 64 * 64)
    assert [Frame(rows, parts, x).open for rows in (31, 32)] == [False, True]
    assert Frame(48, parts, x).key == Frame(32, parts, x).key == frame.key != Frame(16, parts, x).key
    assert not Frame(32, parts._replace(keep="all"), x).open
    results(four := Played(32), weights, tensors, after=True)
    assert not four.recorded.frame.open


def test_what_is_held():
    """What a forward and a backward alone need lies in the same memory."""
    tensors, weights = case("nf4")
    results(played := Played(32), weights, leaves_of(tensors), heads_normed=True)
    widths = (64 + 8) + 64 + 8 + (64 + 8) + (128 + 8)  # normed, u, shrunk, to_y, to_qkv
    widths += max((64 + 16) + (128 + 8), (64 + 8) + 64 + 64)  # normed_mlp product; to_u to_rows to_n
    frame = played.recorded.frame
    weights = max((128 + 8) * (64 + 8) + 64 * (64 + 8), 64 * (128 + 8))  # of q, k, v and o; of down
    assert frame.nbytes == 4 * (32 * widths + frame.found.numel() + frame.values.numel() + weights)
    assert {name: tuple(x.shape) for name, x in frame.weights.items()} == {
        "qkv": (136, 72), "o": (64, 72), "down": (64, 136),
    }  # fmt: skip
    shared = frame.rows("shared", 32).data_ptr()
    assert frame.rows("normed_mlp", 32).data_ptr() == frame.rows("to_u", 32).data_ptr() == shared


def test_with_kernels(kernel_device):
    """Kernels that read and write buffers wider than what they are of."""
    tensors, weights = case("dense", device=kernel_device)
    tensors, weights = leaves_of(tensors), [w.to(kernel_device) for w in weights]
    options = {"keep": "attention", "heads_normed": True}
    ours = results(Played(16), weights, tensors, impl="triton", **options)
    for a, b in zip(ours, results(decoder_layer, weights, tensors, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
