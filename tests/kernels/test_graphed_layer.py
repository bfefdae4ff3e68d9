"""A decoder layer by recorded steps: the frame, its surplus rows and addresses, against the same layer eagerly."""

import pytest
import torch
from slothrl_kernels.decoder_layer import decoder_layer
from slothrl_kernels.graphed_layer import graphed_layer
from slothrl_kernels.layer_frame import Frame, frame_key
from slothrl_kernels.layer_recorder import Rerun
from slothrl_kernels.layer_steps import turned_in
from slothrl_kernels.recorded_layer import addresses, bucket, record_layer

from tests.kernels.test_decoder_layer import JOINT, SHAPES, called, case, wanted_of
from tests.kernels.test_lora_linear import values


class Played:
    """In the place of `decoder_layer`: records once and plays from then on, while the addresses are the same."""

    def __init__(self, rows):
        self.rows, self.recorded, self.parts, self.times = rows, None, None, 0

    def __call__(self, x, parts):
        self.parts = parts = self.settled(parts)
        if self.recorded is None or self.recorded.addresses != addresses(parts):
            frame = self.recorded.frame if self.recorded else Frame(self.rows, parts, x)
            self.recorded, self.times = record_layer(parts, frame, self.rows, Rerun()), self.times + 1
        return graphed_layer(x, parts, self.recorded)

    def settled(self, parts):
        """`called` makes weights, biases and norms at every call: those of the first, where they are."""
        if self.parts is None:
            return parts
        first = self.parts
        groups = [
            tuple(p._replace(weight=old.weight, bias=old.bias) for p, old in zip(new, before, strict=True))
            for new, before in zip(parts.groups, first.groups, strict=True)
        ]
        own = {name: getattr(first, name) for name in ("first", "second", "norms", "after")}
        return parts._replace(qkv=groups[0], o=groups[1][0], inner=groups[2], down=groups[3][0], **own)


def results(layer, weights, tensors, seed=20, **options):
    """The output and all gradients; `tensors` are leaves already."""
    y = called(layer, weights, **options)(*tensors)
    wanted = [tensors[i] for i in wanted_of(tensors)]
    return [y.detach(), *torch.autograd.grad(y, wanted, values(*y.shape, seed=seed).to(y))]


def leaves_of(tensors, dtype=torch.float32):
    return [None if t is None else t.to(dtype).clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("keep", ["input", "attention", "all"])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [14, 32])
def test_equal_to_the_eager_layer(kind, keep, rows):
    """To the bit where no rows are added; biases make what surplus rows give nonzero, and none of it may show."""
    tensors, weights = case(kind, JOINT if keep == "attention" else SHAPES)
    options = {"keep": keep, "biases": True, "heads_normed": kind == "dense", "after": kind == "dense"}
    tensors, played = leaves_of(tensors), Played(rows)
    eager = results(decoder_layer, weights, tensors, **options)
    other = [values(2, 7, 64, seed=3).requires_grad_(), *tensors[1:]]
    for turn in range(3):  # what one turn leaves in the frame is not seen by the next
        ours = results(played, weights, tensors, **options)
        bound = 0 if rows == 14 else 2e-6
        assert all((a - b).abs().max() <= bound * max(1, b.abs().max()) for a, b in zip(ours, eager, strict=True)), turn
        results(played, weights, other, **options)
    assert played.times == 1


def test_fewer_tokens_after_more():
    tensors, weights = case("nf4")
    tensors, played = leaves_of(tensors), Played(48)
    for shape in ((2, 24), (1, 5), (3, 9), (2, 7), (1, 1)):
        now = [values(*shape, 64).requires_grad_(), *tensors[1:]]
        for ours, eager in zip(*(results(f, weights, now, biases=True) for f in (played, decoder_layer)), strict=True):
            torch.testing.assert_close(ours, eager, rtol=2e-6, atol=2e-6)
    assert played.times == 1
    with pytest.raises(ValueError, match="recording of 48 tokens"):
        results(played, weights, [values(7, 7, 64).requires_grad_(), *tensors[1:]], biases=True)


def test_garbage_in_the_surplus_does_not_show():
    """Every row that a step does not read as the call's own is filled by the frame itself."""
    tensors, weights = case("nf4")
    tensors, played = leaves_of(tensors), Played(32)
    eager = results(decoder_layer, weights, tensors, biases=True)
    results(played, weights, tensors, biases=True)
    frame = played.recorded.frame
    for name in ("state", "rows", "qkv", "to_u"):
        frame.rows(name, 32).fill_(7.0)
        frame.wrote(32, name)
    for ours, plain in zip(results(played, weights, tensors, biases=True), eager, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("normed", [False, True])
def test_layers_of_other_heads_in_one_frame(normed):
    """Of the same sizes, with heads half as many and twice as wide: every layer sees its own."""
    tensors, weights = case("dense")
    tensors, played = leaves_of(tensors), Played(16)
    results(played, weights, tensors, heads_normed=normed)
    parts, frame = played.parts, played.recorded.frame
    other = parts._replace(heads=parts.heads // 2, kv_heads=parts.kv_heads // 2, width=2 * parts.width)
    assert frame_key(other, tensors[0], 16) == frame.key
    for mine in (parts, other, parts):
        q, k, v = turned_in(frame, torch.Size((2, 7, 64)), mine, copied=False)[1:]
        assert q.shape == (2, mine.heads, 7, mine.width)
        assert k.shape == v.shape == (2, mine.kv_heads, 7, mine.width)


def test_several_forwards_before_the_backwards():
    """Layers take turns in one frame: nothing a backward needs may stay in it; gradients are nobody else's memory."""
    tensors, weights = case("dense")
    for keep in ("input", "attention", "all"):
        one = leaves_of(tensors)
        two = [values(2, 7, 64, seed=5).requires_grad_(), *one[1:]]
        options = {"keep": keep, "heads_normed": True}
        wanted = [results(decoder_layer, weights, x, **options) for x in (one, two)]
        played = Played(16)
        call = called(played, weights, **options)
        ys = [call(*one), call(*two)]
        assert all(torch.allclose(y, w[0], atol=1e-6) for y, w in zip(ys, wanted, strict=True))
        upstream = values(2, 7, 64, seed=20)
        found = [
            torch.autograd.grad(y, [x[i] for i in wanted_of(x)], upstream) for y, x in zip(ys, (one, two), strict=True)
        ]
        for ours, plain in zip(found, wanted, strict=True):
            for a, b in zip(ours, plain[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        again = call(*one)
        first = torch.autograd.grad(again.sum(), one[1], retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(again.sum(), one[1])[0], first, rtol=2e-6, atol=2e-6)


def test_one_recording_whether_attention_is_kept_or_not():
    """Layers of one model may differ in that, and one layer from call to call; only what keeps all is another."""
    tensors, weights = case("dense")
    tensors, played = leaves_of(tensors), Played(16)
    for keep in ("input", "attention", "input"):
        ours, eager = (results(f, weights, tensors, keep=keep, heads_normed=True) for f in (played, decoder_layer))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert played.times == 1
    with pytest.raises(ValueError, match="'all' for one of 'input'"):
        results(played, weights, tensors, keep="all", heads_normed=True)


def test_adapters_are_read_where_they_are():
    tensors, weights = case("nf4")
    tensors, played = leaves_of(tensors), Played(16)
    before = results(played, weights, tensors)
    with torch.no_grad():
        tensors[2].mul_(-3)  # an optimizer's step: the same memory
    ours, eager = results(played, weights, tensors), results(decoder_layer, weights, tensors)
    assert played.times == 1 and (ours[0] - before[0]).abs().max() > 1e-3
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    y = called(played, weights)(*tensors)
    tensors[2].data = tensors[2].data * 2  # memory elsewhere, between a forward and its backward
    assert played.recorded.addresses != addresses(played.parts)
    found = torch.autograd.grad(y.sum(), tensors[1])[0]
    wanted = torch.autograd.grad(called(decoder_layer, weights)(*tensors).sum(), tensors[1])[0]
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
    y = called(played, weights)(*tensors)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="written to"):
        y.sum().backward()


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 256, 257, 4096, 4097, 16001)] == [16, 16, 32, 256, 272, 4096, 4352, 16384]
    for tokens in range(256, 40000, 37):
        assert tokens <= bucket(tokens) <= tokens * 17 / 16 + 1


def test_what_a_frame_holds():
    tensors, weights = case("dense")
    played = Played(32)
    results(played, weights, leaves_of(tensors), heads_normed=True)
    widths = 64 + 128 + 64 + 64 + 64 + 128 + 16 + 16  # x, qkv, rows, state, to_u, turned, cos, sin
    frame, adapters = played.recorded.frame, sum(t.numel() for t in tensors[1:] if t is not None)
    assert frame.nbytes == 4 * (32 * widths + frame.found.numel())
    assert frame.found.numel() == adapters + 64 + 4 * 64 + 6 * 64 + 4 * 128  # ranks of a group rounded up to 8


@pytest.mark.parametrize("keep", ["input", "all"])
def test_with_kernels(kernel_device, keep):
    """What kernels write over is theirs to write over: frames and what they were filled with."""
    tensors, weights = case("dense", device=kernel_device)
    tensors, weights = leaves_of(tensors), [w.to(kernel_device) for w in weights]
    options = {"heads_normed": keep == "all", "keep": keep}
    ours = results(Played(16), weights, tensors, impl="triton", **options)
    for a, b in zip(ours, results(decoder_layer, weights, tensors, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
