"""The error budget that kernels are held to: float64 is the truth, the same-dtype reference sets the allowance."""

import torch

TOLERANCE = 4e-6  # relative to the largest value


def tolerance_of(kernel: torch.Tensor, largest: float) -> float:
    """What is allowed above the reference's error: TOLERANCE, and in 16 bits half a step, the result's own rounding.

    The reference may by luck round its largest value well, which no kernel can be held to.
    """
    half_step = torch.finfo(kernel.dtype).eps / 2 if kernel.dtype != torch.float32 else 0.0
    if kernel.dtype == torch.bfloat16 and not kernel.is_cuda:
        half_step *= 4  # Triton 3.9's interpreter truncates: whole steps, and twice where a kernel rounds twice
    return TOLERANCE * max(1.0, largest) + half_step * largest


def check_budget(names, exact, plain, ours) -> None:
    """Each result's error against float64 is at most the same-dtype reference's plus a tolerance.

    exact, plain, ours: results of the float64 reference, of the reference in the dtype at hand, and of the kernel.
    """
    for name, truth, reference, kernel in zip(names, exact, plain, ours, strict=True):
        assert kernel.isfinite().all(), name
        assert (kernel.dtype, kernel.shape) == (reference.dtype, reference.shape), name
        if truth.numel():
            error, allowed = ((x.double() - truth).abs().max().item() for x in (kernel, reference))
            allowed += tolerance_of(kernel, truth.abs().max().item())
            assert error <= allowed, f"{name}: {error} > {allowed}"


def run_with_gradients(function, inputs, wanted, upstream):
    """function(*inputs) with a leaf of each input, its outputs and the gradients of the inputs named in `wanted`.

    upstream: one tensor an output, its gradient; cast to the output's dtype.
    """
    leaves = [None if x is None else x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    for i in wanted:
        leaves[i].requires_grad_()
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(y.dtype) for y, g in zip(outputs, upstream, strict=True)])
    for i, leaf in enumerate(leaves):
        assert leaf is None or (leaf.grad is not None) == (i in wanted), i
    return [*(y.detach() for y in outputs), *(leaves[i].grad for i in wanted)]


def budget_of(kernel, reference, inputs, wanted, upstream) -> None:
    """Outputs and gradients of `kernel` under the budget; `reference` is its plain-torch truth."""
    exact = run_with_gradients(reference, [x if x is None else x.double() for x in inputs], wanted, upstream)
    plain = run_with_gradients(reference, inputs, wanted, upstream)
    ours = run_with_gradients(kernel, inputs, wanted, upstream)
    names = [f"output {i}" for i in range(len(upstream))] + [f"gradient {i}" for i in wanted]
    check_budget(names, exact, plain, ours)
