"""Values and gradients without autograd are autograd's: RMSNorm, RoPE, GLU; kernels and plain torch; into buffers."""

import pytest
import torch
from slothrl_kernels import add_rms_norm, glu, glu_forward, rms_norm, rope, rope_turn
from slothrl_kernels.rms_norm_math import rms_norm_backward, rms_norm_forward

from tests.kernels.test_rope import angles, values

IMPLS = pytest.mark.parametrize("impl", ["triton", "torch"])


def gap_in_rows(like):
    """A buffer of like's shape as the left part of wider rows, NaN; and the whole."""
    whole = torch.full((*like.shape[:-1], like.size(-1) + 3), float("nan"), device=like.device)
    return whole[..., : like.size(-1)], whole


@IMPLS
@pytest.mark.parametrize("shift, cast_first", [(0.0, True), (1.0, False)], ids=["llama", "gemma"])
def test_rms_norm(kernel_device, impl, shift, cast_first):
    x, residual, to_y, to_sum = (values((2, 5, 24), device=kernel_device, seed=i) for i in range(4))
    weight = values((24,), device=kernel_device, seed=9)
    leaves = [a.clone().requires_grad_() for a in (x, residual, weight)]
    expected = add_rms_norm(*leaves, 1e-5, shift, cast_first, impl="torch")
    gradients = torch.autograd.grad(expected, leaves, (to_y, to_sum))
    out, whole = gap_in_rows(x)
    y, total, r = rms_norm_forward(x, residual, weight, 1e-5, shift, cast_first, impl, out, residual)
    assert y is out and total is residual and whole[..., 24:].isnan().all() and r.shape == (10,)
    torch.testing.assert_close((y, total), tuple(e.detach() for e in expected))
    to_x, to_weight = rms_norm_backward(to_y, to_sum, total, r, weight, shift, cast_first, True, impl, out=to_sum)
    assert to_x is to_sum
    torch.testing.assert_close((to_x, to_x, to_weight), gradients, atol=1e-5, rtol=1e-5)


@IMPLS
def test_rms_norm_alone(kernel_device, impl):
    x, to_y = (values((7, 40), torch.float16, kernel_device, i) for i in range(2))
    leaf = x.clone().requires_grad_()
    expected = rms_norm(leaf, None, impl="torch")
    y, total, r = rms_norm_forward(x, None, None, impl=impl)
    assert total is x
    to_x, to_weight = rms_norm_backward(to_y, None, total, r, None, impl=impl)
    assert to_weight is None
    wanted = torch.autograd.grad(expected, leaf, to_y)[0]
    torch.testing.assert_close((y, to_x), (expected.detach(), wanted), atol=4e-3, rtol=2e-3)


@IMPLS
@pytest.mark.parametrize("turned", [16, 6])
@pytest.mark.parametrize("in_place", [False, True])
def test_rope(kernel_device, impl, turned, in_place):
    q, k = (values((2, n, 5, 16), device=kernel_device, seed=n).requires_grad_() for n in (3, 2))
    cos, sin = angles(2, 5, turned, device=kernel_device)
    sin = sin * torch.linspace(1, 2, turned, device=kernel_device)  # halves that differ
    expected = rope(q, k, cos, sin, impl="torch")
    upstream = [values(x.shape, device=kernel_device, seed=5) for x in (q, k)]
    gradients = torch.autograd.grad(expected, (q, k), upstream)
    found = rope_turn(q.detach().clone(), k.detach().clone(), cos, sin, False, in_place, impl)
    torch.testing.assert_close(found, tuple(e.detach() for e in expected))
    found = rope_turn(*upstream, cos, sin, True, in_place, impl)
    torch.testing.assert_close(found, gradients)
    assert torch.equal(upstream[0], found[0]) == in_place


@IMPLS
def test_glu(kernel_device, impl):
    gate, up = (values((3, 5, 24), device=kernel_device, seed=i) for i in range(2))
    expected = glu(gate, up, "gelu_tanh", impl="torch")
    out, whole = gap_in_rows(gate)
    assert glu_forward(gate, up, "gelu_tanh", impl, out) is out and whole[..., 24:].isnan().all()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(glu_forward(gate, up, "gelu_tanh", impl, gate), expected)
    assert gate.equal(out)
