"""RMSNorm, alone and on a residual sum: outputs and gradients under an error budget; the reference against others'."""

from functools import partial

import pytest
import torch
from slothrl_kernels import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

from tests.kernels.budget import budget_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("shift, cast_first", [(0.0, True), (1.0, False)], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(1, 1), (7, 63), (33, 128), (5, 2000), (3, 4097)])
def test_error_budget(kernel_device, rows, width, dtype, shift, cast_first):
    x, weight = values((rows, width), dtype, kernel_device), values((width,), dtype, kernel_device, 1)
    options = {"eps": 1e-5, "shift": shift, "cast_first": cast_first}
    kernel, reference = partial(rms_norm, **options, impl="triton"), partial(rms_norm_reference, **options)
    budget_of(kernel, reference, [x, weight], [0, 1], [values((rows, width), device=kernel_device, seed=2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [[0, 1], [0, 1, 2], [1, 2]], ids=["frozen weight", "all", "no x"])
def test_residual(kernel_device, dtype, wanted):
    inputs = [values((2, 5, 100), dtype, kernel_device, i) for i in range(2)] + [values((100,), dtype, kernel_device)]
    upstream = [values((2, 5, 100), device=kernel_device, seed=i) for i in (3, 4)]
    budget_of(partial(add_rms_norm, impl="triton"), add_rms_norm_reference, inputs, wanted, upstream)


def test_without_weight(kernel_device):
    x = values((9, 65), torch.float16, kernel_device)
    budget_of(
        partial(rms_norm, impl="triton"), rms_norm_reference, [x, None], [0], [values((9, 65), device=kernel_device)]
    )


def test_weight_of_another_dtype(kernel_device):
    x, weight = values((9, 65), torch.float16, kernel_device), values((65,), torch.float32, kernel_device)
    upstream = [values((9, 65), device=kernel_device)]
    budget_of(partial(rms_norm, impl="triton"), rms_norm_reference, [x, weight], [0, 1], upstream)


def test_only_one_output_used(kernel_device):
    """Gradients of an unused output are absent, not zeros in memory."""
    weight = values((64,), device=kernel_device)
    for used in (0, 1):
        gradients = []
        for function in (partial(add_rms_norm, impl="triton"), add_rms_norm_reference):
            leaves = [values((4, 64), device=kernel_device, seed=i).requires_grad_() for i in range(2)]
            function(*leaves, weight)[used].square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "view", [lambda x: x[:, :, 5:69], lambda x: x.transpose(0, 1)[..., :64], lambda x: x[..., ::2]]
)
def test_any_strides(kernel_device, view):
    x = view(values((4, 6, 128), device=kernel_device))
    weight = values((64,), device=kernel_device)
    torch.testing.assert_close(rms_norm(x, weight, impl="triton"), rms_norm_reference(x, weight))
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, weight, impl="triton").sum().backward()  # a gradient of stride 0
    expected = x.clone().requires_grad_()
    rms_norm_reference(expected, weight).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad, atol=1e-5, rtol=1e-5)


def test_more_rows_than_programs(kernel_device):
    """The weight's gradient is summed over several turns of each program."""
    x, weight = values((701, 96), device=kernel_device), values((96,), device=kernel_device)
    budget_of(
        partial(rms_norm, impl="triton"),
        rms_norm_reference,
        [x, weight],
        [0, 1],
        [values((701, 96), device=kernel_device)],
    )


def test_no_rows(kernel_device):
    x = torch.zeros(0, 8, device=kernel_device, requires_grad=True)
    weight = torch.ones(8, device=kernel_device, requires_grad=True)
    rms_norm(x, weight, impl="triton").sum().backward()
    assert x.grad.shape == (0, 8) and (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(100, eps=1e-5).to(dtype)
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(100, eps=1e-5).to(dtype)
    x = values((5, 100), dtype)
    for module in (llama, gemma):
        torch.nn.init.normal_(module.weight)
    assert torch.equal(rms_norm(x, llama.weight, 1e-5), llama(x))
    assert torch.equal(rms_norm(x, gemma.weight, 1e-5, 1.0, False), gemma(x))


def test_refuses():
    x, weight = values((4, 8)), values((8,))
    for arguments in ((x, weight[:4]), (x.long(), weight), (x[0, 0], weight)):
        for function in (rms_norm, rms_norm_reference):
            with pytest.raises(ValueError):
                function(*arguments)
    for residual in (x[:2], x.half()):
        with pytest.raises(ValueError):
            add_rms_norm(x, residual, weight)
