"""SwiGLU and GEGLU: outputs and gradients under an error budget; the reference against transformers' activations."""

from functools import partial

import pytest
import torch
from slothrl_kernels import glu, glu_reference

from tests.kernels.budget import budget_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


def values(shape, dtype=torch.float32, device="cpu", seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).to(device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 63), (2, 5, 100), (3, 2049)])
def test_error_budget(kernel_device, shape, dtype, activation):
    gate, up, gradient = (values(shape, dtype, kernel_device, seed) for seed in range(3))
    kernel = partial(glu, activation=activation, impl="triton")
    budget_of(kernel, partial(glu_reference, activation=activation), [gate, up], [0, 1], [gradient.float()])


@pytest.mark.parametrize("wanted", [[0], [1]])
def test_one_gradient(kernel_device, wanted):
    gate, up, gradient = (values((3, 65), device=kernel_device, seed=seed) for seed in range(3))
    budget_of(partial(glu, impl="triton"), glu_reference, [gate, up], wanted, [gradient])


def test_halves_of_one_projection(kernel_device):
    fused = values((2, 5, 140), device=kernel_device)
    gradients = []
    for function in (partial(glu, impl="triton"), glu_reference):
        leaf = fused.clone().requires_grad_()
        y = function(*leaf.chunk(2, -1))
        y.sum().backward()  # a gradient of stride 0
        gradients.append((y, leaf.grad))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    ours = glu(fused[..., ::2], fused[..., 1::2], impl="triton")
    torch.testing.assert_close(ours, glu_reference(fused[..., ::2], fused[..., 1::2]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(kernel_device, activation):
    gate = torch.tensor([-1e4, -300.0, -90.0, -12.0, 0.0, 12.0, 90.0, 1e4], device=kernel_device)
    up = torch.ones_like(gate)
    kernel = partial(glu, activation=activation, impl="triton")
    budget_of(kernel, partial(glu_reference, activation=activation), [gate, up], [0, 1], [up])


def test_keeps_gate_and_up_only(kernel_device):
    gate, up = (values((4, 8), device=kernel_device, seed=seed).requires_grad_() for seed in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        glu(gate, up, impl="triton")
    assert [tensor.data_ptr() for tensor in kept] == [gate.data_ptr(), up.data_ptr()]


def test_nothing(kernel_device):
    gate = torch.zeros(0, 8, device=kernel_device, requires_grad=True)
    glu(gate, gate.detach(), impl="triton").sum().backward()
    assert gate.grad.shape == (0, 8)


def test_reference_is_transformers():
    functions = pytest.importorskip("transformers.activations").ACT2FN
    gate, up = values((3, 7), torch.bfloat16), values((3, 7), torch.bfloat16, seed=1)
    for name, theirs in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")):
        assert torch.equal(glu(gate, up, name), functions[theirs](gate) * up)


def test_refuses():
    gate = torch.zeros(3, 4)
    for arguments in ((gate, gate[:2]), (gate, gate.half()), (gate.long(), gate.long()), (gate, gate, "relu")):
        for function in (glu, glu_reference):
            with pytest.raises(ValueError):
                function(*arguments)
