"""RMSNorm over each head of q and k, then RoPE, in one launch (Qwen3, arXiv:2505.09388; Gemma 3, arXiv:2503.19786).

    y = rotate(x / sqrt(mean(x^2) + eps) * (weight + shift))

with the maths of `rms_norm` and `rope`. The backward takes q and k as they were before, whose norms it computes anew
from the rows that it reads anyway: turned back by the negative angle, the gradient is RMSNorm's. Nothing else is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.qk_norm_rope_kernels import qk_backward_kernel, qk_forward_kernel
from slothrl_kernels.rms_norm import rms_norm_reference
from slothrl_kernels.rope import check_rope, projected_like, rope_reference, unit_strides, written_to
from slothrl_kernels.switch import HAS_TRITON, Impl, processors, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton

MAX_WIDTH = 1024  # entries of a head that a program holds
TILE = 1024  # pairs that a program holds at once; half of that beside the weights' sums, which are as large


class QKNorm(NamedTuple):
    """What two norms have in common: `rms_norm`'s arguments of the same names."""

    eps: float = 1e-6
    shift: float = 0.0
    cast_first: bool = True


LLAMA = QKNorm()


class QKGradients(NamedTuple):
    """Of q, k and, where they were wanted, of the two weights."""

    q: Tensor
    k: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, norm: QKNorm = LLAMA
) -> tuple[Tensor, Tensor]:
    """The plain-torch truth of `qk_norm_rope`, with the same arguments; differentiable; float64 stays float64."""
    _check(q, k, q_weight, k_weight, cos, sin)
    return rope_reference(rms_norm_reference(q, q_weight, *norm), rms_norm_reference(k, k_weight, *norm), cos, sin)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: QKNorm = LLAMA,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k normalised head by head and rotated; differentiable in q, k and the weights, not in cos and sin.

    Args:
        q: (B, Hq, S, D), k: (B, Hk, S, D) of one dtype, float32, bfloat16 or float16; any strides, so that the
            transposed view of a projection's output, packed (1, T, H, D) too, is taken as it is.
        q_weight, k_weight: (D,) of any float dtype.
        cos, sin: (B or 1, S, R), as `rope`.
        norm: eps, the shift of the weights and where the rounding is.
        impl: "auto" runs Triton where it serves, and heads of at most 1,024; else the reference.

    Returns:
        q and k of their own shapes and dtype, in the order of their strides. float32 inside; rounded once, and before
        the weight where norm.cast_first.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    if not _serves(impl, q):
        return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, norm)
    return _QKNormRope.apply(q, k, q_weight, k_weight, cos, sin, norm)  # pyright: ignore


def qk_norm_rope_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: QKNorm = LLAMA,
    impl: Impl = "auto",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` without autograd; its backward needs nothing but the same arguments. Args, raises: as there.

    out: where the results go, of q's and k's shapes, with rows of unit stride.
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    if not _serves(impl, q):
        q, k, q_weight, k_weight = (x.detach() for x in (q, k, q_weight, k_weight))
        found = qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, norm)
        return found if out is None else written_to(out, found)
    inputs, (cos, sin) = unit_strides(q, k), unit_strides(cos, sin)
    outputs = out or [projected_like(x) for x in inputs]
    tokens = q.size(0) * q.size(2)
    if tokens:
        with torch.cuda.device_of(q):
            qk_forward_kernel[(tokens,)](
                *inputs, *outputs, q_weight.contiguous(), k_weight.contiguous(), cos, sin,
                *_strides(*inputs, *outputs), *_angle_strides(cos, sin), q.size(2), q.size(1), k.size(1),
                cos.size(2) // 2, q.size(3) - cos.size(2), float(norm.eps), float(norm.shift),
                CAST_FIRST=norm.cast_first, **_tile(q, k, cos),
            )  # fmt: skip
    return outputs[0], outputs[1]


def qk_norm_rope_backward(
    to_q: Tensor,
    to_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: QKNorm = LLAMA,
    wants_weights: bool = False,
    impl: Impl = "auto",
    in_place: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> QKGradients:
    """The gradients from those of the outputs, without autograd.

    Args:
        to_q, to_k: of the outputs, in their shapes and dtype; any strides.
        q, k and the others: as they were given to the forward.
        wants_weights: whether the weights' gradients, in the weights' dtypes, are computed.
        in_place: the gradients of q and k are written over to_q and to_k, and those are returned.
        out: where they go instead, of q's and k's shapes, with rows of unit stride.

    Raises: as `qk_norm_rope`.
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    if (to_q.shape, to_k.shape) != (q.shape, k.shape):
        raise ValueError(f"gradients {tuple(to_q.shape)} and {tuple(to_k.shape)} of {tuple(q.shape)}, {tuple(k.shape)}")
    if not _serves(impl, q):
        found = _backward_reference(to_q, to_k, q, k, q_weight, k_weight, cos, sin, norm, wants_weights)
        target = out or ((to_q, to_k) if in_place else None)
        return _written_over(found, *target) if target else found
    gradients, inputs, (cos, sin) = unit_strides(to_q, to_k), unit_strides(q, k), unit_strides(cos, sin)
    outputs = out or (gradients if in_place else [projected_like(x) for x in gradients])
    tokens, width = q.size(0) * q.size(2), q.size(3)
    programs = min(tokens, 4 * processors(q.device)) if wants_weights else tokens
    partials = torch.empty(2, programs, width, dtype=torch.float32, device=q.device) if wants_weights else q
    if tokens:
        with torch.cuda.device_of(q):
            qk_backward_kernel[(programs,)](
                *gradients, *inputs, *outputs, q_weight.contiguous(), k_weight.contiguous(), cos, sin, partials,
                *_strides(*gradients, *inputs, *outputs), *_angle_strides(cos, sin), tokens, q.size(2),
                triton.cdiv(tokens, programs), q.size(1), k.size(1), cos.size(2) // 2, width - cos.size(2),
                float(norm.eps), float(norm.shift), CAST_FIRST=norm.cast_first, WANTS_WEIGHT=wants_weights,
                **_tile(q, k, cos, TILE // 2 if wants_weights else TILE),
            )  # fmt: skip
    found = QKGradients(outputs[0], outputs[1], None, None)
    if wants_weights:
        sums = partials.sum(1)
        found = found._replace(q_weight=sums[0].to(q_weight.dtype), k_weight=sums[1].to(k_weight.dtype))
    return _written_over(found, to_q, to_k) if in_place else found


def _written_over(found: QKGradients, to_q: Tensor, to_k: Tensor) -> QKGradients:
    """Copied back where they are other tensors: by plain torch, or where strides forced a copy."""
    for target, made in ((to_q, found.q), (to_k, found.k)):
        if made is not target:
            target.copy_(made)
    return found._replace(q=to_q, k=to_k)


def _backward_reference(
    to_q: Tensor, to_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    norm: QKNorm, wants_weights: bool,
) -> QKGradients:  # fmt: skip
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    leaves += [x.detach().requires_grad_(wants_weights) for x in (q_weight, k_weight)]
    with torch.enable_grad():
        outputs = qk_norm_rope_reference(leaves[0], leaves[1], leaves[2], leaves[3], cos, sin, norm)
    found = torch.autograd.grad(outputs, leaves if wants_weights else leaves[:2], (to_q, to_k))
    return QKGradients(found[0], found[1], *(found[2:] if wants_weights else (None, None)))


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rope(q, k, cos, sin)
    for weight in (q_weight, k_weight):
        if weight.shape != q.shape[-1:] or weight.device != q.device or not weight.is_floating_point():
            found = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
            raise ValueError(f"the weights must be ({q.size(-1)},) floats on {q.device}, not {found}")


def _serves(impl: Impl, q: Tensor) -> bool:
    return takes_triton(impl, q) and q.dtype != torch.float64 and q.size(3) <= MAX_WIDTH


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _angle_strides(*tables: Tensor) -> list[int]:
    return [stride for x in tables for stride in (x.stride(0) if x.size(0) > 1 else 0, x.stride(1))]


def _tile(q: Tensor, k: Tensor, cos: Tensor, pairs: int = TILE) -> dict[str, int]:
    half, rest = triton.next_power_of_2(cos.size(2) // 2), q.size(3) - cos.size(2)
    heads = triton.next_power_of_2(max(q.size(1), k.size(1), 1))
    rest = triton.next_power_of_2(rest) if rest else 0
    heads = max(1, min(heads, pairs // max(half, rest)))
    return {"HEADS": heads, "HALF": half, "REST": rest, "num_warps": 4}


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, norm: QKNorm
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.norm = norm
        return qk_norm_rope_forward(q, k, q_weight, k_weight, cos, sin, norm, "triton")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        wanted, saved = ctx.needs_input_grad[2:4], list(ctx.saved_tensors)
        found = qk_norm_rope_backward(*gradients, *saved, norm=ctx.norm, wants_weights=any(wanted), impl="triton")
        weights = (gradient if want else None for gradient, want in zip(found[2:], wanted, strict=True))
        return found.q, found.k, *weights, None, None, None
