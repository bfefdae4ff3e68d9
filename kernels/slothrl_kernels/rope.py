"""Rotary position embedding (Su et al., arXiv:2104.09864) on q and k in one launch, halves paired as in transformers.

For a head x with its first R entries in two halves (x1, x2), and cos and sin (.., R) in halves of the same names:

    y1 = x1 cos1 - x2 sin1          y2 = x2 cos2 + x1 sin2

Entries from R on pass through (partial rotary). The backward is the transposed map, the rotation by the negative angle:

    dx1 = dy1 cos1 + dy2 sin2       dx2 = dy2 cos2 - dy1 sin1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.rope_kernels import rope_kernel
from slothrl_kernels.switch import HAS_TRITON, Impl, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton

TILE = 2048  # pairs of q, and of k, that a program holds at once


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """The plain-torch truth of `rope`, with the same arguments; differentiable; in the inputs' dtype throughout."""
    check_rope(q, k, cos, sin)
    rotated = [_rotate_reference(x, cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]) for x in (q, k)]
    if in_place:
        with torch.no_grad():
            for x, y in zip((q, k), rotated, strict=True):
                x.copy_(y)
    return rotated[0], rotated[1]


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., : cos.size(-1)], x[..., cos.size(-1) :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, in_place: bool = False, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """q and k rotated by their positions; differentiable in q and k, not in cos and sin.

    Args:
        q: (B, Hq, S, D), k: (B, Hk, S, D) of one dtype, float32, bfloat16 or float16; any strides, so that the
            transposed view of a projection's output is taken as it is. Hk may be smaller (GQA).
        cos, sin: (B or 1, S, R) of any float dtype, gathered for whatever position ids (packed sequences, offsets); R
            is even and at most D.
        in_place: write over the memory of q and k and return tensors on it. Autograd raises in the backward if anything
            had saved q or k; a projection's output is saved by nobody.
        impl: "auto" runs Triton where it serves, else the reference.

    Returns:
        q and k of their own shapes and dtype; new ones keep the order of their strides. float32 inside, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    check_rope(q, k, cos, sin)
    if not takes_triton(impl, q) or q.dtype == torch.float64:
        return rope_reference(q, k, cos, sin, in_place)
    return _Rope.apply(q, k, cos, sin, in_place)  # pyright: ignore


def rope_turn(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    backward: bool = False,
    in_place: bool = False,
    impl: Impl = "auto",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` without autograd; or, with `backward`, the gradients of q and k from those of the outputs.

    Args, returns, raises: as `rope`; with `backward`, q and k are the outputs' gradients. out: where the results go,
    of q's and k's shapes, with rows of unit stride; not with in_place.
    """
    check_rope(q, k, cos, sin)
    if takes_triton(impl, q) and q.dtype != torch.float64:
        cos, sin = unit_strides(cos, sin)
        q, k = _turn([q, k], cos, sin, backward, in_place, out)
        return q, k
    if backward:
        first, second = sin.chunk(2, -1)  # the transposed rotation: by the negative angle, its sines changed over
        sin = torch.cat([-second, -first], -1)
    found = rope_reference(q.detach(), k.detach(), cos, sin, in_place)
    return found if out is None else written_to(out, found)


def unit_strides(*tensors: Tensor) -> list[Tensor]:
    """Each as it is where its last dimension has stride 1, else a copy."""
    return [x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous() for x in tensors]


def projected_like(x: Tensor) -> Tensor:
    """An empty (B, H, S, D) in the order that x has its heads and tokens in memory.

    `empty_like` forgets that order where x is a slice of a wider projection, and then whoever reads token by token, as
    the next projection, makes a copy.
    """
    batch, heads, length, width = x.shape
    if x.stride(1) > x.stride(2) and heads > 1:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or not q.is_floating_point() or (q.dtype, q.device) != (k.dtype, k.device):
        raise ValueError(
            f"q and k must be 4-D floats of one dtype, not {q.dim()}-D {q.dtype} and {k.dim()}-D {k.dtype}"
        )
    batch, _, length, width = q.shape
    if (k.size(0), k.size(2), k.size(3)) != (batch, length, width):
        raise ValueError(f"k must be ({batch}, heads, {length}, {width}), not {tuple(k.shape)}")
    if cos.shape != sin.shape or cos.dim() != 3 or cos.size(0) not in (1, batch) or cos.size(1) != length:
        raise ValueError(f"cos and sin must be ({batch} or 1, {length}, R), not {tuple(cos.shape)}, {tuple(sin.shape)}")
    if cos.size(2) % 2 or not 0 < cos.size(2) <= width or cos.device != q.device or sin.device != q.device:
        raise ValueError(f"R must be even and at most {width}, on {q.device}, not {cos.size(2)} on {cos.device}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        cos, sin = unit_strides(cos, sin)
        ctx.save_for_backward(cos, sin)
        outputs = _turn([q, k], cos, sin, backward=False, in_place=in_place)
        if in_place:
            torch.autograd.graph.increment_version((q, k))
        return outputs[0], outputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        to_q, to_k = _turn(list(gradients), cos, sin, backward=True, in_place=False)
        return to_q, to_k, None, None, None


def heads_at_once(x: Tensor, half_block: int) -> int:
    """Of x (B, H, S, D), a power of two."""
    return max(1, min(triton.next_power_of_2(x.size(1)), TILE // half_block))


def written_to(out: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`found` copied into `out`, which is returned."""
    for target, made in zip(out, found, strict=True):
        target.copy_(made)
    return out


def _turn(
    heads: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    backward: bool,
    in_place: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """q and k, or their gradients, turned; a copy first where the strides are not those of a tensor of its own."""
    inputs = unit_strides(*heads)
    outputs = list(out) if out else inputs if in_place else [projected_like(x) for x in inputs]
    (q, k), (batch, _, length, width), turned = inputs, inputs[0].shape, cos.size(2)
    half_block = triton.next_power_of_2(turned // 2)
    if min(batch, length) > 0:
        with torch.cuda.device_of(q):
            rope_kernel[(batch * length,)](
                q,
                k,
                *outputs,
                cos,
                sin,
                *(stride for x in (q, k, *outputs) for stride in x.stride()[:3]),
                cos.stride(0) if cos.size(0) > 1 else 0,
                cos.stride(1),
                sin.stride(0) if sin.size(0) > 1 else 0,
                sin.stride(1),
                length,
                q.size(1),
                k.size(1),
                turned // 2,
                0 if in_place else width - turned,
                BACKWARD=backward,
                Q_HEADS=heads_at_once(q, half_block),
                K_HEADS=heads_at_once(k, half_block),
                HALF=half_block,
                REST=triton.next_power_of_2(max(1, width - turned)),
                num_warps=4,
            )
    if in_place:  # back from the copies that strides forced
        outputs = [y.detach() if x is y else y.detach().copy_(x) for x, y in zip(inputs, heads, strict=True)]
    return outputs
