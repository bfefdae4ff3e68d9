"""The plain-torch truth of `decoder_layer`."""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl_kernels.glu import glu_reference
from slothrl_kernels.layer_parts import LayerParts, Norm
from slothrl_kernels.lora_linear import lora_linear_reference
from slothrl_kernels.rms_norm import rms_norm_reference
from slothrl_kernels.rope import rope_reference


def decoder_layer_reference(x: Tensor, parts: LayerParts) -> Tensor:
    """`decoder_layer` with the same arguments, in transformers' and PEFT's order; differentiable; float64 too."""
    batch, length, _ = x.shape
    qkv = torch.cat(lora_linear_reference(_norm(x, parts.first), parts.qkv), -1)
    counts = [parts.heads, parts.kv_heads, parts.kv_heads]
    q, k, v = (heads.transpose(1, 2) for heads in qkv.view(batch, length, -1, parts.width).split(counts, 2))
    if parts.norms is not None:
        q, k = (rms_norm_reference(x, weight, *parts.norm) for x, weight in zip((q, k), parts.norms, strict=True))
    if parts.tables is not None:
        q, k = rope_reference(q, k, *parts.tables)
    out = parts.attend(q, k, v).reshape(batch, length, -1)
    u = x + _after(lora_linear_reference(out, [parts.o])[0], parts.after_o())
    gate, up = torch.cat(lora_linear_reference(_norm(u, parts.second), parts.inner), -1).chunk(2, -1)
    return u + _after(
        lora_linear_reference(glu_reference(gate, up, parts.activation), [parts.down])[0], parts.after_down()
    )


def _after(made: Tensor, norm: Norm | None) -> Tensor:
    return made if norm is None else _norm(made, norm)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return rms_norm_reference(x, norm.weight, norm.eps, norm.shift, norm.cast_first)
