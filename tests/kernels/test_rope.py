"""RoPE on q and k: an error budget for outputs and gradients, layouts, in place; the reference is transformers'."""

from functools import partial

import pytest
import torch
from slothrl_kernels import rope, rope_reference

from tests.kernels.budget import budget_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def angles(batch, length, turned, dtype=torch.float32, device="cpu"):
    """cos and sin of ids that jump as in packed rows, a different set for each row of the batch."""
    ids = torch.randint(1000, (batch, length, 1), generator=torch.Generator().manual_seed(length))
    frequency = 10000 ** (-torch.arange(0, turned, 2) / turned)
    angle = torch.cat([ids * frequency] * 2, -1)
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def with_angles(function, cos, sin, **options):
    """function of q and k alone; float64 q and k get float64 angles."""
    return lambda q, k: function(q, k, *(x.double() if q.dtype == torch.float64 else x for x in (cos, sin)), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, width, turned", [((1, 1), 2, 2), ((4, 2), 64, 64), ((3, 1), 40, 10), ((5, 5), 96, 96), ((17, 2), 128, 128)]
)
def test_error_budget(kernel_device, heads, width, turned, dtype):
    q, k = (values((2, n, 7, width), dtype, kernel_device, n) for n in heads)
    cos, sin = angles(2, 7, turned, dtype, kernel_device)
    kernel, reference = with_angles(rope, cos, sin, impl="triton"), with_angles(rope_reference, cos, sin)
    upstream = [values(x.shape, device=kernel_device, seed=9) for x in (q, k)]
    budget_of(kernel, reference, [q, k], [0, 1], upstream)
    budget_of(lambda a, b: kernel(a, b)[0], lambda a, b: reference(a, b)[0], [q, k.clone()], [0], upstream[:1])


def test_halves_need_not_be_alike(kernel_device):
    """Nothing relies on the two halves of cos and sin being the same."""
    q, k = (values((1, n, 5, 16), device=kernel_device, seed=n) for n in (3, 2))
    cos, sin = (values((1, 5, 16), device=kernel_device, seed=n) for n in (4, 5))
    kernel, reference = with_angles(rope, cos, sin, impl="triton"), with_angles(rope_reference, cos, sin)
    budget_of(kernel, reference, [q, k], [0, 1], [q, k])


def test_backward_is_the_negative_angle(kernel_device):
    q, k = (values((1, n, 5, 16), device=kernel_device, seed=n).requires_grad_() for n in (3, 2))
    cos, sin = angles(1, 5, 16, device=kernel_device)
    gradients = torch.autograd.grad(rope(q, k, cos, sin, impl="triton"), (q, k), (q.detach(), k.detach()))
    torch.testing.assert_close(gradients, rope(q.detach(), k.detach(), cos, -sin, impl="triton"))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("turned", [32, 12])
def test_views_of_one_projection(kernel_device, in_place, turned):
    """q and k as the transposed slices of a fused projection; the same positions for the whole batch."""
    fused = values((2, 6, (4 + 2 + 2) * 32), device=kernel_device)
    cos, sin = angles(1, 6, turned, device=kernel_device)
    expected = fused.clone().view(2, 6, 8, 32).transpose(1, 2)
    expected[:, :4], expected[:, 4:6] = rope_reference(expected[:, :4].clone(), expected[:, 4:6].clone(), cos, sin)
    heads = fused.clone().view(2, 6, 8, 32).transpose(1, 2)
    before = heads.clone()
    q, k = rope(heads[:, :4], heads[:, 4:6], cos, sin, in_place, "triton")
    torch.testing.assert_close((q, k), (expected[:, :4], expected[:, 4:6]))
    torch.testing.assert_close(heads, expected if in_place else before)


def test_in_place_under_autograd(kernel_device):
    cos, sin = angles(2, 6, 16, device=kernel_device)
    weight = values((48, 48), device=kernel_device)
    x, gradients = values((2, 6, 48), device=kernel_device), []
    for function in (partial(rope, in_place=True, impl="triton"), rope_reference):
        leaf = x.clone().requires_grad_()
        heads = (leaf @ weight).view(2, 6, 3, 16).transpose(1, 2)
        q, k = function(heads[:, :2], heads[:, 2:], cos, sin)
        (q.square().sum() + k.sum()).backward()
        gradients.append((q.detach(), k.detach(), leaf.grad))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_in_place_over_what_is_needed_raises(kernel_device):
    cos, sin = angles(1, 4, 8, device=kernel_device)
    q, k = (values((1, 1, 4, 8), device=kernel_device, seed=n).requires_grad_() for n in range(2))
    saved = q * 1
    loss = saved.square().sum()  # keeps `saved`
    rope(saved, k * 1, cos, sin, True, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_no_tokens(kernel_device):
    q = torch.zeros(1, 2, 0, 8, device=kernel_device)
    cos = torch.zeros(1, 0, 8, device=kernel_device)
    assert [x.shape for x in rope(q, q, cos, cos, impl="triton")] == [q.shape] * 2


def test_strided_heads(kernel_device):
    q = values((1, 2, 4, 16), device=kernel_device)[..., ::2]
    cos, sin = angles(1, 4, 8, device=kernel_device)
    torch.testing.assert_close(rope(q, q, cos, sin, impl="triton"), rope_reference(q, q, cos, sin))
    for turned in (8, 6):
        cos, sin = angles(1, 4, turned, device=kernel_device)
        whole = q.contiguous()
        expected = rope_reference(q, q, cos, sin)[0]
        rope(whole, q, cos, sin, True, "triton")  # one of the two in place, the other by way of a copy
        torch.testing.assert_close((whole, q), (expected, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_transformers(dtype):
    theirs = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    q, k = (values((2, n, 5, 16), dtype, seed=n) for n in (4, 2))
    cos, sin = angles(2, 5, 16, dtype)
    for ours, expected in zip(rope(q, k, cos, sin), theirs(q, k, cos, sin), strict=True):
        assert torch.equal(ours, expected)


def test_refuses():
    q, (cos, sin) = torch.zeros(2, 3, 4, 8), angles(2, 4, 8)
    wrong = [
        (q[0], q, cos, sin),
        (q, q.half(), cos, sin),
        (q, q[:, :, :2], cos, sin),
        (q, q, cos[:, :2], sin[:, :2]),
        (q, q, cos, sin[:1]),
        (q, q, cos[..., :3], sin[..., :3]),
        (q[..., :4], q[..., :4], cos, sin),
    ]
    for arguments in wrong:
        for function in (rope, rope_reference):
            with pytest.raises(ValueError):
                function(*arguments)
