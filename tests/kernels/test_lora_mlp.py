"""The gated MLP with LoRA as one step: values and gradients under a budget, and what it keeps and recomputes."""

import sys
from functools import partial

import pytest
import torch
from slothrl_kernels import Projection, glu_backward, glu_backward_reference, lora_mlp, lora_mlp_reference
from torch.utils.checkpoint import checkpoint

from tests.kernels.budget import budget_of, check_budget
from tests.kernels.nf4_cases import quantized
from tests.kernels.test_lora_linear import held, values

SHAPES = [(48, 64), (48, 64), (32, 48)]  # gate, up, down


def case(dtype, kind="nf4", shapes=SHAPES):
    """(x, then A, B, bias of gate, up and down; their base weights)."""
    tensors = [values(2, 7, 64, dtype=dtype)]
    for i, (outputs, inputs) in enumerate(shapes):
        tensors += [
            values(4, inputs, dtype=dtype, seed=i, scale=0.2),
            values(outputs, 4, dtype=dtype, seed=i + 5, scale=0.2),
        ]
        tensors.append(values(outputs, dtype=dtype, seed=i + 8) if i else None)
    weights = [quantized(s)[2] if kind == "nf4" else values(*s, dtype=dtype, scale=0.1) for s in shapes]
    return tensors, weights


def called(function, weights, **options):
    def call(x, *flat):
        cast = [held(w, x.dtype) for w in weights]
        group = [Projection(w, flat[3 * i + 2], *flat[3 * i : 3 * i + 2], 0.5 * (i + 1)) for i, w in enumerate(cast)]
        return function(x, group[:-1], group[-1], **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_error_budget(activation, recompute, dtype):
    tensors, weights = case(dtype)
    kernel = called(lora_mlp, weights, activation=activation, recompute=recompute)
    wanted = [i for i, t in enumerate(tensors) if t is not None]
    reference = called(lora_mlp_reference, weights, activation=activation)
    budget_of(kernel, reference, tensors, wanted, [values(2, 7, 32, seed=20)])


@pytest.mark.parametrize("recompute", [False, True])
def test_gate_and_up_in_one(recompute):
    tensors, weights = case(torch.float32, shapes=[(96, 64), (32, 48)])
    kernel = called(lora_mlp, weights, recompute=recompute)
    wanted = [i for i, t in enumerate(tensors) if t is not None]
    budget_of(kernel, called(lora_mlp_reference, weights), tensors, wanted, [values(2, 7, 32, seed=20)])


@pytest.mark.parametrize("wanted", [[0], [1, 2], [7, 8], [6]], ids=["x", "gate's A and B", "down's A and B", "bias"])
@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_is_wanted(recompute, wanted):
    tensors, weights = case(torch.float32, "dense")
    kernel = called(lora_mlp, weights, recompute=recompute)
    budget_of(kernel, called(lora_mlp_reference, weights), tensors, wanted, [values(2, 7, 32, seed=20)])


def test_keeps_what_it_says():
    tensors, weights = case(torch.float32)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    for recompute, shapes in ((True, [(2, 7, 64)]), (False, [(2, 7, 64), (14, 8), (14, 8), (14, 48), (14, 48)])):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            called(lora_mlp, weights, recompute=recompute)(*leaves)
        assert [tuple(t.shape) for t in kept] == shapes


def test_a_checkpoint_never_runs_down_again(monkeypatch):
    """Forward: 2 times `project`, the group and down. Backward: the group once more, whatever is around it."""
    module = sys.modules["slothrl_kernels.lora_mlp"]  # the package's attribute of that name is the function
    calls, project = [], module.project
    monkeypatch.setattr(
        module, "project", lambda x, group, **options: calls.append(len(group)) or project(x, group, **options)
    )
    tensors, weights = case(torch.float32)
    gradients = []
    for checkpointed in (False, True):
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
        call = called(lora_mlp, weights, recompute=True)
        block = lambda x, *rest, call=call: x[..., :32] + call(x * 1.5, *rest)  # noqa: E731
        y = checkpoint(block, *leaves, use_reentrant=False) if checkpointed else block(*leaves)
        calls.clear()
        y.square().sum().backward()
        assert calls == [2]
        gradients.append([t.grad for t in leaves if t is not None])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("in_place", [False, True])
def test_glu_backward(kernel_device, in_place, activation, dtype):
    inputs = [values(3, 65, dtype=dtype, seed=seed).to(kernel_device) for seed in range(3)]
    exact = glu_backward_reference(*(t.double() for t in inputs), activation)
    plain = glu_backward_reference(*inputs, activation)
    copies = [t.clone() for t in inputs]
    ours = glu_backward(*copies, activation, impl="triton", in_place=in_place)
    check_budget(["y", "gate", "up"], exact, plain, ours)
    written = [t.data_ptr() for t in ours] == [copies[i].data_ptr() for i in (2, 0, 1)]
    assert written == in_place and (in_place or all(map(torch.equal, copies, inputs)))


def test_through_the_kernels(kernel_device):
    tensors, weights = case(torch.float32, "dense")
    tensors = [t if t is None else t.to(kernel_device) for t in tensors]
    weights = [w.to(kernel_device) for w in weights]
    kernel = called(partial(lora_mlp, recompute=True, impl="triton"), weights)
    wanted = [i for i, t in enumerate(tensors) if t is not None]
    upstream = [values(2, 7, 32, seed=20).to(kernel_device)]
    budget_of(kernel, called(lora_mlp_reference, weights), tensors, wanted, upstream)


def test_refuses():
    _, weights = case(torch.float32)
    gate, up, down = (Projection(w) for w in weights)
    for inner, outer in (([gate], down), ([gate, up, up], down), ([gate, down], down), ([gate, up], up), ([], down)):
        with pytest.raises(ValueError):
            lora_mlp(values(5, 64), inner, outer)


def test_without_lora_and_without_gradient():
    _, weights = case(torch.float32)
    x = values(5, 64)
    inner, down = [Projection(w) for w in weights[:2]], Projection(weights[2])
    torch.testing.assert_close(lora_mlp(x, inner, down, recompute=True), lora_mlp_reference(x, inner, down))
    leaf = x.requires_grad_()
    lora_mlp(leaf, inner, down, recompute=True).sum().backward()
    assert leaf.grad.isfinite().all()
