"""A decoder layer as one step: values and gradients under a budget, whatever it keeps, over nf4 and dense weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from slothrl_kernels import Projection
from slothrl_kernels.decoder_layer import HOLD, decoder_layer
from slothrl_kernels.layer_mlp import columns_of, tile_bytes, tiles_of
from slothrl_kernels.layer_parts import LayerParts, Norm
from slothrl_kernels.layer_reference import decoder_layer_reference
from slothrl_kernels.lora_flat import adapter_values
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.qk_norm_rope import QKNorm

from tests.kernels.budget import budget_of
from tests.kernels.nf4_cases import quantized
from tests.kernels.test_lora_linear import held, values
from tests.kernels.test_rope import angles

# Outputs, inputs and rank of q, k, v, o, gate, up, down: 4 heads of 16 on 2; ranks whose sums are no multiples of 8.
SHAPES = [(64, 64, 4), (32, 64, 3), (32, 64, 0), (64, 64, 4), (128, 64, 8), (128, 64, 2), (64, 128, 4)]
JOINT = [(128, 64, 4), (64, 64, 4), (256, 64, 4), (64, 128, 4)]  # q, k, v in one; gate and up in one


def attend(q, k, v):
    q, k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def case(kind, shapes=SHAPES, tokens=(2, 7), device="cpu"):
    """(x, then A and B of every projection; their weights)."""
    tensors = [values(*tokens, 64)]
    for i, (outputs, inputs, rank) in enumerate(shapes):
        tensors += [values(rank, inputs, seed=i, scale=0.2), values(outputs, rank, seed=i + 9, scale=0.2)]
    tensors = [t if t.numel() else None for t in tensors]
    weights = [quantized(s[:2])[2] if kind == "nf4" else values(*s[:2], scale=0.1) for s in shapes]
    return [None if t is None else t.to(device) for t in tensors], weights


def called(function, weights, keep="input", impl="torch", biases=False, heads_normed=False, rotated=True, after=False):
    def call(x, *flat):
        like = {"dtype": x.dtype, "device": x.device}
        bias = [values(w.shape[0], seed=i).to(**like) if biases else None for i, w in enumerate(weights)]
        pairs = zip(weights, bias, flat[::2], flat[1::2], strict=True)
        made = [Projection(held(w, x.dtype), b, a, b2, 0.3 * (i % 3 + 1)) for i, (w, b, a, b2) in enumerate(pairs)]
        count = 3 if len(made) == 7 else 1
        qkv, o, inner, down = made[:count], made[count], made[count + 1 : -1], made[-1]
        first, second = (Norm(1 + values(64, seed=s).to(**like), 1e-5, 0.0, True) for s in (31, 32))
        over = [values(16, seed=s).to(**like) for s in (33, 34)] if heads_normed else None
        tables = [t.to(**like) for t in angles(1, x.size(1), 16)] if rotated else None
        follow = tuple(Norm(values(64, seed=s).to(**like), 1e-6, 1.0, False) for s in (35, 36)) if after else None
        parts = LayerParts(
            first, tuple(qkv), 4, 2, 16, tables, over, QKNorm(1e-6, 1.0, False), attend, o, second, tuple(inner), down,
            "silu", keep, impl, follow,
        )  # fmt: skip
        return function(x, parts)

    return call


def wanted_of(tensors):
    return [i for i, t in enumerate(tensors) if t is not None]


@pytest.mark.parametrize("keep", ["input", "attention", "all"])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_error_budget(kind, keep):
    tensors, weights = case(kind)
    options = {"biases": True, "heads_normed": keep != "attention"}
    ours, truth = called(decoder_layer, weights, keep, **options), called(decoder_layer_reference, weights, **options)
    budget_of(ours, truth, tensors, wanted_of(tensors), [values(2, 7, 64, seed=20)])


@pytest.mark.parametrize("keep", ["input", "attention", "all"])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_norms_before_the_sums(kind, keep):
    """As in Gemma 2 and 3: what o and down give is normed before it is added."""
    tensors, weights = case(kind, JOINT if keep == "attention" else SHAPES)
    options = {"biases": keep != "all", "after": True}
    ours, truth = called(decoder_layer, weights, keep, **options), called(decoder_layer_reference, weights, **options)
    budget_of(ours, truth, tensors, wanted_of(tensors), [values(2, 7, 64, seed=20)])


def test_norms_before_the_sums_and_an_mlp_in_tiles(monkeypatch):
    in_tiles(monkeypatch)
    tensors, weights = case("nf4")
    options = {"biases": True, "after": True}
    ours, truth = called(decoder_layer, weights, **options), called(decoder_layer_reference, weights, **options)
    budget_of(ours, truth, tensors, wanted_of(tensors), [values(2, 7, 64, seed=20)])


def test_projections_in_one_and_no_rotation():
    tensors, weights = case("nf4", JOINT)
    ours = called(decoder_layer, weights, rotated=False)
    truth = called(decoder_layer_reference, weights, rotated=False)
    budget_of(ours, truth, tensors, wanted_of(tensors), [values(2, 7, 64, seed=20)])


def test_many_tokens_hold_the_unpacked_weights(monkeypatch):
    """From HOLD times the width on, each weight is unpacked twice: for the forward, and for what follows."""
    from slothrl_kernels import lora_group, nf4_group

    tensors, weights = case("nf4", tokens=(1, HOLD * 64))
    count, dense = [], lora_group.dense
    for module in (lora_group, nf4_group):
        monkeypatch.setattr(module, "dense", lambda *a, **k: count.append(1) or dense(*a, **k))
    ours, truth = called(decoder_layer, weights), called(decoder_layer_reference, weights)
    budget_of(ours, truth, tensors, wanted_of(tensors), [values(1, HOLD * 64, 64, seed=20)])
    assert len(count) == 7 + 8  # o forward again, and its gradient


def in_tiles(monkeypatch):
    """Of 48, 48 and 32 columns."""
    from slothrl_kernels import layer_mlp

    monkeypatch.setattr(layer_mlp, "TILE", 1)
    monkeypatch.setattr(layer_mlp, "GRAIN", 48)


@pytest.mark.parametrize("shapes", [SHAPES, JOINT], ids=["two", "joint"])
def test_an_mlp_in_tiles(monkeypatch, shapes):
    tensors, weights = case("nf4", shapes)
    upstream = [values(2, 7, 64, seed=20)]
    whole = called(decoder_layer, weights, biases=True)(*tensors)
    in_tiles(monkeypatch)
    ours = called(decoder_layer, weights, biases=True)
    assert torch.allclose(ours(*tensors), whole, rtol=1e-5, atol=1e-5)
    budget_of(ours, called(decoder_layer_reference, weights, biases=True), tensors, wanted_of(tensors), upstream)
    without = [tensors[0], *[None] * (2 * len(shapes))]
    budget_of(called(decoder_layer, weights), called(decoder_layer_reference, weights), without, [0], upstream)


def test_how_many_tiles():
    """Llama-3-8B's MLP over 4,096 tokens in two; at most eight; dense weights and few tokens in one."""

    def tiles(tokens, weight, outputs=14336, inputs=4096):
        up, down = (Projection(weight(n, m)) for n, m in ((outputs, inputs), (inputs, outputs)))
        parts = SimpleNamespace(inner=(up, up), down=down)
        return tiles_of(parts, torch.empty(tokens, inputs, dtype=torch.bfloat16, device="meta"))

    def nf4(outputs, inputs):
        count = outputs * inputs
        packed, absmax = (torch.empty(n, dtype=torch.uint8) for n in (count // 2, count // 64))
        return Nf4Weight(packed, absmax.float(), torch.zeros(16), (outputs, inputs))

    assert tiles(4096, nf4) == [slice(0, 7168), slice(7168, 14336)]
    assert len(tiles(32768, nf4)) == 8 and len(tiles(512, nf4)) == 1
    assert tiles(4096, lambda *shape: torch.empty(shape, device="meta")) == [slice(0, 14336)]
    assert [tile_bytes(gib << 30) >> 20 for gib in (0, 8, 12, 16, 80)] == [128, 128, 128, 256, 256]
    assert columns_of(4096, 14336, 2, tile_bytes(24 << 30)) == 14336


def test_x_alone_and_adapters_alone():
    tensors, weights = case("nf4")
    for wanted in ([0], [1, 2]):
        budget = (called(decoder_layer, weights), called(decoder_layer_reference, weights))
        budget_of(*budget, tensors, wanted, [values(2, 7, 64, seed=20)])
    no_adapters = [tensors[0], *[None] * 14]
    budget_of(*budget, no_adapters, [0], [values(2, 7, 64, seed=20)])


def test_a_second_backward_and_a_changed_adapter():
    tensors, weights = case("dense")
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    y = called(decoder_layer, weights, "all")(*leaves)
    first = torch.autograd.grad(y.sum(), leaves[0], retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(y.sum(), leaves[0], retain_graph=True)[0], first, atol=1e-6)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="written to"):
        y.sum().backward()


def test_only_adapters_are_trained():
    tensors, weights = case("dense")
    weights[3].requires_grad_()
    with pytest.raises(ValueError, match="only adapters"):
        called(decoder_layer, weights)(*tensors)
    with pytest.raises(ValueError, match="do not fit"):
        called(decoder_layer, weights[:3] + weights[4:] + weights[:1])(*tensors)


def test_values_side_by_side():
    a, b = values(3, 5), values(4, 3, seed=1)
    found = adapter_values([[Projection(values(4, 5), None, a, b, 0.5), Projection(values(6, 5))]], a.half())
    assert found[0].a.shape == (8, 5) and found[0].a.dtype == torch.float16 and found[0].b[1] is None
    assert torch.equal(found[0].a[:3], a.half() * 0.5) and found[0].a[3:].eq(0).all()
    assert torch.equal(found[0].b[0], b.half())


@pytest.mark.parametrize("keep", ["input", "all"])
def test_with_kernels(kernel_device, keep):
    """Written over: what kernels put in the place of their inputs is read by nobody afterwards."""
    tensors, weights = case("dense", device=kernel_device)
    weights = [w.to(kernel_device) for w in weights]
    options = {"heads_normed": keep == "all", "after": keep == "input"}
    ours = called(decoder_layer, weights, keep, "triton", **options)
    truth = called(decoder_layer_reference, weights, **options)
    upstream = values(2, 7, 64, seed=20).to(kernel_device)
    budget_of(ours, truth, tensors, wanted_of(tensors), [upstream])


def test_tiles_with_kernels(kernel_device, monkeypatch):
    tensors, _ = case("nf4", device=kernel_device)
    weights = [quantized(s[:2], 64, True, kernel_device)[2] for s in SHAPES]
    in_tiles(monkeypatch)
    ours = called(decoder_layer, weights, impl="triton", biases=True)
    truth = called(decoder_layer_reference, weights, biases=True)
    budget_of(ours, truth, tensors, wanted_of(tensors), [values(2, 7, 64, seed=20).to(kernel_device)])
