"""Linear layers with LoRA: values and all gradients under an error budget, in every layout and over every base."""

import pytest
import torch
from slothrl_kernels import Int8Weight, Projection, lora_linear, lora_linear_reference
from slothrl_kernels.base_weight import dense
from slothrl_kernels.lora_math import settle

from tests.kernels.budget import budget_of
from tests.kernels.nf4_cases import quantized

DTYPES = [torch.float32, torch.bfloat16]


def values(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def base_weight(kind, outputs, inputs, dtype):
    if kind == "nf4":
        return quantized((outputs, inputs), nested=True)[2]
    if kind == "int8":
        functional = pytest.importorskip("bitsandbytes.functional")
        codes, absmax, _ = functional.int8_vectorwise_quant(values(outputs, inputs, dtype=torch.float16))
        return Int8Weight(codes, absmax)
    return values(outputs, inputs, dtype=dtype, seed=outputs)


def case(kind, outputs, dtype, inputs=64, rank=5, bias=False, adapters=None):
    """(tensors: x, then A, B and bias of every projection; which of them are there; the weights)."""
    tensors = [values(2, 7, inputs, dtype=dtype)]
    for i, count in enumerate(outputs):
        tensors.append(values(rank + i, inputs, dtype=adapters or dtype, seed=i + 1, scale=0.3))
        tensors.append(values(count, rank + i, dtype=adapters or dtype, seed=i + 9, scale=0.3))
        tensors.append(values(count, dtype=dtype, seed=i) if bias else None)
    return tensors, [base_weight(kind, count, inputs, dtype) for count in outputs]


def held(weight, dtype):
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight


def called(function, weights, **options):
    """function(x, A_1, B_1, bias_1, …): a float64 x takes dense weights of the same values."""

    def call(x, *flat):
        group = [
            Projection(held(w, x.dtype), flat[3 * i + 2], *flat[3 * i : 3 * i + 2], 0.7 + i)
            for i, w in enumerate(weights)
        ]
        return tuple(function(x, group, **options))

    return call


def check(tensors, weights, layout, wanted=None, **options):
    wanted = [i for i, t in enumerate(tensors) if t is not None] if wanted is None else wanted
    upstream = [values(*tensors[0].shape[:-1], w.shape[0], seed=30 + i) for i, w in enumerate(weights)]
    kernel = called(lora_linear, weights, layout=layout, **options)
    budget_of(kernel, called(lora_linear_reference, weights, **options), tensors, wanted, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["narrow", "wide", "tall"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
def test_single(kind, layout, dtype):
    check(*case(kind, [40], dtype, bias=True), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["narrow", "wide"])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_group_of_different_widths_ranks_and_scalings(kind, layout, dtype):
    check(*case(kind, [48, 16, 33], dtype, bias=True), layout)


@pytest.mark.parametrize("layout", ["narrow", "wide", "tall"])
@pytest.mark.parametrize("wanted", [[0], [1, 2], [2], [0, 3]], ids=["x", "A and B", "B", "x and bias"])
def test_only_what_is_wanted(layout, wanted):
    check(*case("nf4", [40], torch.float32, bias=True), layout, wanted)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_without_lora(kind):
    weight = base_weight(kind, 24, 64, torch.float32)
    x, bias = values(3, 64), values(24)
    call, plain = (lambda x, b, f=f: tuple(f(x, [Projection(weight, b)])) for f in (lora_linear, lora_linear_reference))
    budget_of(call, plain, [x, bias], [0, 1], [values(3, 24, seed=5)])


def test_one_adapter_of_the_group_is_missing():
    tensors, weights = case("nf4", [48, 16], torch.float32)
    tensors[4] = tensors[5] = None
    check(tensors, weights, "wide")
    check(tensors, weights, "narrow")


@pytest.mark.parametrize("layout", ["narrow", "wide", "tall"])
def test_float32_adapters_over_bf16(layout):
    """What PEFT does without autocast: the LoRA in float32, as if it were not rounded at all."""
    check(*case("nf4", [40], torch.bfloat16, adapters=torch.float32), layout, lora_dtype=torch.float32)


def test_float32_adapters_in_the_dtype_of_x():
    """What PEFT does under autocast: the values are rounded for the computation, the gradients arrive in float32."""
    tensors, weights = case("nf4", [48, 16], torch.bfloat16)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        cast = [t if t is None or i == 0 else t.to(dtype) for i, t in enumerate(tensors)]
        leaves = [t if t is None else t.detach().requires_grad_() for t in cast]
        sum(y.float().square().sum() for y in called(lora_linear, weights)(*leaves)).backward()
        assert all(t is None or t.grad.dtype == t.dtype for t in leaves)
        gradients.append([t.grad.float() for t in leaves if t is not None])
    torch.testing.assert_close(*gradients, rtol=2**-8, atol=0)


def test_dropout_draws_the_reference_s_numbers():
    tensors, weights = case("nf4", [48, 16], torch.float32)
    results = []
    for function in (lora_linear, lora_linear_reference):
        torch.manual_seed(3)
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
        dropout = [torch.nn.Dropout(0.5), torch.nn.Dropout(0.25)]
        outputs = called(function, weights, dropout=dropout)(*leaves)
        sum(y.square().sum() for y in outputs).backward()
        results.append([*outputs, *(t.grad for t in leaves if t is not None), torch.rand(3)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_autocast_changes_nothing():
    tensors, weights = case("nf4", [48, 16], torch.float32)
    plain = called(lora_linear, weights)(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, called(lora_linear, weights)(*tensors), plain))


def test_keeps_x_and_the_rank_products_only():
    tensors, weights = case("nf4", [48, 16], torch.float32)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        called(lora_linear, weights)(*leaves)
    assert [tuple(t.shape) for t in kept] == [(2, 7, 64), (14, 16)]
    assert kept[0].data_ptr() == leaves[0].data_ptr()


def test_frozen_input_unpacks_nothing_in_the_backward(monkeypatch):
    import slothrl_kernels.lora_math as lora_math

    tensors, weights = case("nf4", [48, 16], torch.float32)
    leaves = [t if t is None or i == 0 else t.requires_grad_() for i, t in enumerate(tensors)]
    outputs = called(lora_linear, weights, layout="wide")(*leaves)
    monkeypatch.setattr(lora_math, "dense", None)
    sum(y.sum() for y in outputs).backward()
    assert leaves[0].grad is None and leaves[1].grad.abs().sum() > 0


def test_layouts_by_size():
    up, down = (base_weight("nf4", *shape, torch.float32) for shape in ((96, 64), (64, 64)))
    a, b = values(4, 64), values(96, 4)
    lora, plain = Projection(up, None, a, b), Projection(up)
    square = Projection(down, None, a, values(64, 4))
    held = Projection(values(96, 64), None, a, b)
    cases = [([lora], 4096, "wide"), ([lora], 256, "narrow"), ([square], 4096, "tall"), ([square] * 2, 4096, "wide")]
    cases += [([plain], 4096, "narrow"), ([held], 4096, "narrow"), ([lora, held], 4096, "narrow")]
    for group, rows, layout in cases:
        assert settle(group, rows) == layout


def test_int8_is_bitsandbytes_own_dequantisation():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = base_weight("int8", 12, 64, torch.float32)
    expected = functional.int8_vectorwise_dequant(weight.codes, weight.absmax)
    torch.testing.assert_close(dense(weight, torch.float32), expected, atol=1e-7, rtol=1e-6)


def test_refuses():
    weight, x, a, b = values(8, 4), values(3, 4), values(2, 4), values(8, 2)
    for group in ([], [Projection(weight, None, b, a)], [Projection(weight, values(4))], [Projection(weight, None, a)]):
        with pytest.raises(ValueError):
            lora_linear(x, group)
    with pytest.raises(ValueError, match="requires grad"):
        lora_linear(x, [Projection(weight.clone().requires_grad_())])
    with pytest.raises(ValueError, match="layout"):
        lora_linear(x, [Projection(weight, None, a, b)] * 2, layout="tall")
    with pytest.raises(ValueError):
        Int8Weight(weight, values(8))
