"""A layer that keeps all in buffers of its own: exact too for whoever finds them taken, or not as they were left."""

import gc

import pytest
import torch
from slothrl_kernels import kept_steps
from slothrl_kernels.decoder_layer import decoder_layer
from slothrl_kernels.graphed_layer import graphed_layer
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_own import own_bytes, own_widths
from slothrl_kernels.layer_recorder import Rerun
from slothrl_kernels.recorded_layer import record_layer

from tests.kernels.test_decoder_layer import JOINT, called, case, wanted_of
from tests.kernels.test_graphed_layer import Played, leaves_of, results
from tests.kernels.test_lora_linear import values

OPTIONS = {"keep": "all", "heads_normed": True, "biases": True}


class Counted(Played):
    """Says how many of its forwards used the buffers."""

    used = 0

    def __call__(self, x, parts):
        free = self.recorded is None or not self.recorded.own.taken
        self.used += free
        return super().__call__(x, parts)


def assert_equal(ours, eager):
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def gradients(y, tensors, **options):
    upstream = values(*y.shape, seed=20).to(y)
    return [y.detach(), *torch.autograd.grad(y, [tensors[i] for i in wanted_of(tensors)], upstream, **options)]


def made(kind="nf4", shapes=None, tokens=(2, 7)):
    tensors, weights = case(kind, *(() if shapes is None else (shapes,)), tokens=tokens)
    return leaves_of(tensors), weights


@pytest.mark.parametrize("apart", [1, 2048], ids=["ends apart", "ends in steps"])
@pytest.mark.parametrize("options", [{}, {"heads_normed": True}, {"rotated": False}, {"after": True, "biases": True}])
def test_to_the_bit(options, apart, monkeypatch):
    """Who computes what is at the ends of steps changes nothing, nor do rows that are left over of longer calls."""
    monkeypatch.setattr(kept_steps, "APART", apart)
    tensors, weights = made("dense" if options.get("after") else "nf4", JOINT if options == {} else None)
    other = [values(3, 8, 64, seed=3).requires_grad_(), *tensors[1:]]
    for rows, bound in ((14, 0), (24, 2e-6)):
        played = Played(rows)
        eager = results(decoder_layer, weights, tensors, keep="all", **options)
        for _ in range(2):
            ours = results(played, weights, tensors, keep="all", **options)
            assert all((a - b).abs().max() <= bound * max(1, b.abs().max()) for a, b in zip(ours, eager, strict=True))
            if rows == 24:
                results(played, weights, other, keep="all", **options)


@pytest.mark.parametrize("apart", [1, 2048])
def test_projections_without_adapters(apart, monkeypatch):
    """Of o and down alone, and of q, k, v, gate and up alone: rank products of no columns."""
    monkeypatch.setattr(kept_steps, "APART", apart)
    tensors, weights = made()
    for without in ((7, 8, 13, 14), (1, 2, 3, 4, 5, 6, 9, 10, 11, 12)):
        some = [None if i in without else t for i, t in enumerate(tensors)]
        eager = results(decoder_layer, weights, some, keep="all", heads_normed=True)
        ours = results(Played(14), weights, some, keep="all", heads_normed=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_two_forwards_before_the_backwards():
    """The second finds the buffers taken, and goes without; in either order of the backwards."""
    one, weights = made()
    two = [values(1, 9, 64, seed=5).requires_grad_(), *one[1:]]
    wanted = [results(decoder_layer, weights, tensors, **OPTIONS) for tensors in (one, two)]
    for first in (0, 1):
        played = Counted(16)
        call = called(played, weights, **OPTIONS)
        ys = [call(*one), call(*two)]
        assert played.used == 1 and played.recorded.own.taken
        for i in (first, 1 - first):
            assert_equal(gradients(ys[i], (one, two)[i]), wanted[i])
        assert not played.recorded.own.taken
        assert_equal(results(played, weights, two, **OPTIONS), wanted[1])
        assert played.used == 2


def test_a_backward_that_never_comes():
    """With the graph of a forward its hold on the buffers goes, whatever ended it."""
    tensors, weights = made()
    eager, played = results(decoder_layer, weights, tensors, **OPTIONS), Counted(16)
    y = called(played, weights, **OPTIONS)(*tensors)
    assert played.recorded.own.taken
    del y
    assert not played.recorded.own.taken
    with pytest.raises(ZeroDivisionError):
        called(played, weights, **OPTIONS)(*tensors).sum() / (1 // 0)
    gc.collect()
    assert not played.recorded.own.taken
    assert_equal(results(played, weights, tensors, **OPTIONS), eager)
    assert played.used == 3 == played.used * played.times


def test_evaluation_between():
    """Without gradients, of other tokens: eagerly while the buffers are taken, by the recording else."""
    tensors, weights = made()
    other = [values(1, 11, 64, seed=6), *tensors[1:]]
    eager, played = results(decoder_layer, weights, tensors, **OPTIONS), Counted(16)
    quiet = {**OPTIONS, "keep": "input"}
    y = called(played, weights, **OPTIONS)(*tensors)
    plain = called(decoder_layer, weights, **quiet)(*other)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(called(played, weights, **quiet)(*other), plain, rtol=2e-6, atol=2e-6)
    assert played.used == 1
    assert_equal(gradients(y, tensors), eager)
    with torch.no_grad():
        torch.testing.assert_close(called(played, weights, **quiet)(*other), plain, rtol=2e-6, atol=2e-6)
    assert played.used == 2 and not played.recorded.own.taken
    other[0].requires_grad_()
    assert_equal(results(played, weights, other, **OPTIONS)[:1], [plain])


@pytest.mark.parametrize("between", [False, True])
def test_a_second_backward(between):
    """Once more by what autograd saved, the layer's input, whoever used the buffers meanwhile; never when freed."""
    tensors, weights = made()
    eager, played = results(decoder_layer, weights, tensors, **OPTIONS), Counted(16)
    y = called(played, weights, **OPTIONS)(*tensors)
    assert_equal(gradients(y, tensors, retain_graph=True), eager)
    if between:
        results(played, weights, [values(2, 7, 64, seed=8).requires_grad_(), *tensors[1:]], **OPTIONS)
        assert played.used == 2
    assert_equal(gradients(y, tensors), eager)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(y, tensors)


def test_moved_between_forward_and_backward():
    """What the forward kept serves the eager backward; what was written to since is refused."""
    for options in (OPTIONS, {**OPTIONS, "after": True}):
        tensors, weights = made()
        played = Played(16)
        y = called(played, weights, **options)(*tensors)
        tensors[2].data = tensors[2].data.clone()
        assert_equal(gradients(y, tensors), results(decoder_layer, weights, tensors, **options))
        y = called(played, weights, **options)(*tensors)
        with torch.no_grad():
            tensors[1].mul_(2)
        with pytest.raises(RuntimeError, match="written to"):
            y.sum().backward()
        assert not played.recorded.own.taken


def test_nobody_else_has_what_is_given_out():
    """Outputs and gradients stay as they were through the calls that follow."""
    tensors, weights = made()
    played = Played(16)
    first = results(played, weights, tensors, **OPTIONS)
    before = [t.clone() for t in first]
    results(played, weights, [values(2, 8, 64, seed=9).requires_grad_(), *tensors[1:]], **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


@pytest.mark.parametrize("apart", [1, 2048])
@pytest.mark.parametrize("after", [False, True])
def test_what_was_not_finite_is_gone(after, apart, monkeypatch):
    """Zero times NaN is NaN: rows beyond the tokens hold nothing of a longer call that went wrong."""
    monkeypatch.setattr(kept_steps, "APART", apart)
    tensors, weights = made()
    played, options = Played(24), {**OPTIONS, "after": after}
    broken = values(3, 8, 64, seed=3)
    broken[1:, 4:] = float("nan")
    assert results(played, weights, [broken.requires_grad_(), *tensors[1:]], **options)[2].isnan().any()
    assert_equal(results(played, weights, tensors, **options), results(decoder_layer, weights, tensors, **options))


def test_several_recordings_and_layers():
    """Two numbers of rows share a layer's buffers, two layers the frame; a layer is not recorded while it is in use."""
    tensors, weights = made()
    played = Played(32)
    eager = results(decoder_layer, weights, tensors, **OPTIONS)
    results(played, weights, tensors, **OPTIONS)
    large, parts = played.recorded, played.parts
    small = record_layer(parts, large.frame, 16, Rerun(), large.own)
    other = record_layer(parts, large.frame, 16, Rerun())
    assert small.own is large.own is not other.own and small.frame is other.frame

    def call(recorded):
        return called(lambda x, new: graphed_layer(x, played.settled(new), recorded), weights, **OPTIONS)

    upper = [values(2, 7, 64, seed=4).requires_grad_(), *tensors[1:]]
    wanted = results(decoder_layer, weights, upper, **OPTIONS)
    for mine in (small, large):
        ys = call(mine)(*tensors), call(other)(*upper)
        with pytest.raises(RuntimeError, match="no time to record"):
            record_layer(parts, large.frame, 16, Rerun(), mine.own)
        assert_equal(gradients(ys[1], upper), wanted)
        assert_equal(gradients(ys[0], tensors), eager)
    with pytest.raises(RuntimeError, match="another backward needs"):
        held = large.own.lend()
        large.own.lend()
    del held


def test_what_is_held():
    """A token of a layer: u, q k v, q k, gate up, the norms, rank products; what attention made it keeps itself."""
    tensors, weights = made("dense")
    played = Played(32)
    results(played, weights, tensors, **OPTIONS)
    own, frame, parts = played.recorded.own, played.recorded.frame, played.parts
    adapters = frame.found.numel()
    widths = {"qkv": 128, "u": 64, "inner": 256, "shrunk": 8, "shrunk_mlp": 8, "turned": 96}
    assert own_widths(parts, tensors[0]) == {**widths, "normed": 64 + 8, "normed_mlp": 64 + 16}
    total = sum(own_widths(parts, tensors[0]).values())
    assert own.nbytes == own_bytes(32, parts, tensors[0]) == 4 * (32 * (total + 2) + adapters)
    widths = 64 + 8 + 64 + 128 + 2 * 64 + 3 * (64 + 8) + 2 * 16  # rows to_rows to_qkv; state x; to_y to_u to_n; tables
    assert frame.nbytes == 4 * (32 * widths + adapters)
    assert Frame(16, parts, tensors[0]).key == frame.key
    results(packed := Played(32), case("nf4")[1], tensors, **{**OPTIONS, "biases": False})
    assert packed.recorded.frame.nbytes == frame.nbytes + 4 * (32 + 64) * (128 + 8)  # what goes into down; its weight


def test_half_precision_adapters_in_float32():
    """Gradients come in the adapters' dtype, though the steps compute them in the layer's."""
    tensors, weights = made()
    tensors[0] = tensors[0].detach().bfloat16().requires_grad_()
    eager = results(decoder_layer, weights, tensors, **OPTIONS)
    ours = results(Played(14), weights, tensors, **OPTIONS)
    assert [t.dtype for t in ours] == [t.dtype for t in eager] and ours[2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_with_kernels_and_ends_apart(kernel_device, monkeypatch):
    """Kernels that read and write buffers wider than what they are of."""
    monkeypatch.setattr(kept_steps, "APART", 1)
    tensors, weights = case("dense", device=kernel_device)
    tensors, weights = leaves_of(tensors), [w.to(kernel_device) for w in weights]
    ours = results(Played(16), weights, tensors, impl="triton", **OPTIONS)
    for a, b in zip(ours, results(decoder_layer, weights, tensors, **OPTIONS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
