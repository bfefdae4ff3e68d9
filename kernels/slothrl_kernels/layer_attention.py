"""The attention half of a decoder layer up to the o projection, forward and backward, without autograd around it.

Tokens are flat, M = B S. q, k and v lie beside each other, as one GEMM writes them, and their gradients do too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slothrl_kernels.layer_parts import LayerParts, Norm
from slothrl_kernels.rms_norm_math import rms_norm_backward, rms_norm_forward
from slothrl_kernels.rope import rope_turn


@dataclass
class Attended:
    """What attention was given and made: under autograd of its own, where a gradient is to follow.

    raw: (M, N) q, k and v as the projections made them, where norms follow; else None.
    scales: r of the norms of q and k.
    q, k, v: (B, heads, S, width), leaves. out: (B, S, heads, width).
    """

    raw: Tensor | None
    scales: tuple[Tensor, Tensor] | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    @property
    def rows(self) -> Tensor:
        """(M, heads * width), without its history."""
        out = self.out.detach()
        return out.reshape(out.size(0) * out.size(1), -1)


def attend(qkv: Tensor, shape: torch.Size, parts: LayerParts, watched: bool) -> Attended:
    """Norms of q and k, rotation and attention on qkv (M, N), which is written over where no norm follows.

    Args:
        shape: (B, S, h) of the layer's input.
        watched: whether a backward follows.
    """
    q, k, v = _heads(qkv, shape, parts)
    scales = None
    if parts.norm_q is not None and parts.norm_k is not None:
        (q, q_scale), (k, k_scale) = (_normed(x, norm, parts) for x, norm in ((q, parts.norm_q), (k, parts.norm_k)))
        scales = (q_scale, k_scale)
    if parts.cos is not None and parts.sin is not None:
        q, k = rope_turn(q, k, parts.cos, parts.sin, in_place=True, impl=parts.impl)
    raw = None if scales is None else qkv
    if not watched:
        with torch.no_grad():
            return Attended(raw, scales, q, k, v, parts.attend(q, k, v))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    # What attention saves stays on the device, whatever hooks are around.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        return Attended(raw, scales, q, k, v, parts.attend(q, k, v))


def attend_backward(to_out: Tensor, attended: Attended, shape: torch.Size, parts: LayerParts) -> Tensor:
    """The gradient of qkv (M, N) from that of the output's rows (M, heads * width)."""
    leaves = (attended.q, attended.k, attended.v)
    to_q, to_k, to_v = torch.autograd.grad(attended.out, leaves, to_out.view(attended.out.shape))
    if attended.raw is None or attended.scales is None:
        beside = torch.cat([_rows(x) for x in (to_q, to_k, to_v)], 1)
        if parts.cos is not None and parts.sin is not None:
            to_q, to_k, _ = _heads(beside, shape, parts)
            rope_turn(to_q, to_k, parts.cos, parts.sin, backward=True, in_place=True, impl=parts.impl)
        return beside
    if parts.cos is not None and parts.sin is not None:
        to_q, to_k = rope_turn(to_q, to_k, parts.cos, parts.sin, backward=True, impl=parts.impl)
    q, k, _ = _heads(attended.raw, shape, parts)
    norms = zip((to_q, to_k), (q, k), attended.scales, (parts.norm_q, parts.norm_k), strict=True)
    to_q, to_k = (_normed_backward(to, x, r, norm, parts) for to, x, r, norm in norms if norm is not None)
    return torch.cat([_rows(x) for x in (to_q, to_k, to_v)], 1)


def _heads(qkv: Tensor, shape: torch.Size, parts: LayerParts) -> list[Tensor]:
    """Views (B, heads, S, width) of q, k and v."""
    counts = [parts.heads, parts.kv_heads, parts.kv_heads]
    pieces = qkv.view(shape[0], shape[1], -1, parts.width).split(counts, 2)
    return [x.transpose(1, 2) for x in pieces]


def _rows(x: Tensor) -> Tensor:
    """(B, heads, S, width) -> (M, heads * width)."""
    return x.transpose(1, 2).reshape(x.size(0) * x.size(2), -1)


def _normed(x: Tensor, norm: Norm, parts: LayerParts) -> tuple[Tensor, Tensor]:
    x = x.transpose(1, 2)  # (B, S, heads, width): as it lies in memory
    y, _, r = rms_norm_forward(x, None, norm.weight, norm.eps, norm.shift, norm.cast_first, parts.impl)
    return y.transpose(1, 2), r


def _normed_backward(to_y: Tensor, x: Tensor, r: Tensor, norm: Norm, parts: LayerParts) -> Tensor:
    options = (norm.weight, norm.shift, norm.cast_first)
    return rms_norm_backward(to_y.transpose(1, 2), None, x.transpose(1, 2), r, *options, impl=parts.impl)[0].transpose(
        1, 2
    )


def _same(x: Tensor) -> Tensor:
    return x
