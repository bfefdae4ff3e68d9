"""RMSNorm of heads and RoPE in one: an error budget for outputs and gradients, layouts; the reference is Qwen3's."""

import pytest
import torch
from slothrl_kernels import (
    QKNorm,
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
    qk_norm_rope_reference,
)

from tests.kernels.budget import budget_of
from tests.kernels.test_rope import angles, values

LLAMA, GEMMA = QKNorm(1e-5), QKNorm(1e-6, 1.0, False)


def case(heads, length, width, turned, dtype, device, batch=2):
    q, k = (values((batch, n, length, width), dtype, device, n) for n in heads)
    weights = [values((width,), dtype, device, seed) for seed in (7, 8)]
    return [q, k, *weights], angles(batch, length, turned, dtype, device)


def with_angles(function, cos, sin, *options):
    def call(*inputs):
        return function(*inputs, *(x.to(inputs[0].dtype) for x in (cos, sin)), *options)

    return call


@pytest.mark.parametrize("norm", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "heads, width, turned", [((1, 1), 2, 2), ((3, 1), 40, 10), ((17, 2), 128, 128)], ids=["least", "partial", "odd"]
)
def test_error_budget(kernel_device, heads, width, turned, dtype, norm):
    inputs, tables = case(heads, 3, width, turned, dtype, kernel_device)
    kernel = with_angles(qk_norm_rope, *tables, norm, "triton")
    upstream = [values(x.shape, device=kernel_device, seed=9) for x in inputs[:2]]
    for wanted in ([0, 1, 2, 3], [0, 1]) if dtype == torch.float32 else ([0, 1, 2, 3],):
        budget_of(kernel, with_angles(qk_norm_rope_reference, *tables, norm), inputs, wanted, upstream)


def test_one_weight_is_trained(kernel_device):
    inputs, tables = case((2, 1), 3, 8, 8, torch.float32, kernel_device)
    upstream = [values(x.shape, device=kernel_device, seed=9) for x in inputs[:2]]
    budget_of(
        with_angles(qk_norm_rope, *tables, LLAMA, "triton"),
        with_angles(qk_norm_rope_reference, *tables, LLAMA),
        inputs,
        [0, 3],
        upstream,
    )


def test_slices_of_one_packed_projection(kernel_device):
    """q and k as slices of (1, T, heads, D): read as they lie, written token by token, tables of one row."""
    fused = values((1, 6, 4 + 2 + 2, 16), device=kernel_device)
    weights = [values((16,), device=kernel_device, seed=seed) for seed in (7, 8)]
    cos, sin = angles(1, 6, 16, device=kernel_device)
    q, k = fused[:, :, :4].transpose(1, 2), fused[:, :, 4:6].transpose(1, 2)
    found = qk_norm_rope(q, k, *weights, cos, sin, impl="triton")
    torch.testing.assert_close(found, qk_norm_rope_reference(q, k, *weights, cos, sin))
    assert all(x.transpose(1, 2).is_contiguous() for x in found)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_without_autograd(kernel_device, impl):
    inputs, tables = case((3, 2), 4, 16, 12, torch.float32, kernel_device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = qk_norm_rope_reference(*leaves, *tables, GEMMA)
    upstream = [values(x.shape, device=kernel_device, seed=5) for x in inputs[:2]]
    wanted = torch.autograd.grad(expected, leaves, upstream)
    found = qk_norm_rope_forward(*leaves, *tables, GEMMA, impl)
    assert not found[0].requires_grad
    torch.testing.assert_close(found, tuple(x.detach() for x in expected))
    gradients = qk_norm_rope_backward(*upstream, *inputs, *tables, GEMMA, True, impl)
    torch.testing.assert_close(tuple(gradients), wanted, atol=1e-5, rtol=1e-5)
    over = qk_norm_rope_backward(*upstream, *inputs, *tables, GEMMA, False, impl, in_place=True)
    assert over.q_weight is None and over.k_weight is None
    torch.testing.assert_close((over.q, over.k), wanted[:2], atol=1e-5, rtol=1e-5)
    assert (over.q is upstream[0]) == (impl == "triton")


def test_no_tokens(kernel_device):
    inputs, tables = case((2, 1), 0, 8, 8, torch.float32, kernel_device)
    leaves = [x.requires_grad_() for x in inputs]
    found = qk_norm_rope(*leaves, *tables, impl="triton")
    gradients = torch.autograd.grad(found, leaves, found)
    assert [x.shape for x in gradients] == [x.shape for x in inputs] and not gradients[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_qwen3s(dtype):
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    (q, k, *weights), tables = case((4, 2), 5, 16, 16, dtype, "cpu")
    norms = [qwen.Qwen3RMSNorm(16, 1e-5).to(dtype) for _ in weights]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data.copy_(weight)
    theirs = qwen.apply_rotary_pos_emb(norms[0](q), norms[1](k), *tables)
    for ours, expected in zip(qk_norm_rope(q, k, *weights, *tables, LLAMA), theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=0.0, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-6)


def test_refuses():
    (q, k, a, b), (cos, sin) = case((2, 1), 3, 8, 8, torch.float32, "cpu")
    wrong = [(q, k, a[:4], b, cos, sin), (q, k, a, b.long(), cos, sin), (q, k[0], a, b, cos, sin)]
    for arguments in [*wrong, (q, k, a, b, cos[..., :3], sin[..., :3])]:
        for function in (qk_norm_rope, qk_norm_rope_forward, qk_norm_rope_reference):
            with pytest.raises(ValueError):
                function(*arguments)
    with pytest.raises(ValueError, match="gradients"):
        qk_norm_rope_backward(q, q, q, k, a, b, cos, sin)
