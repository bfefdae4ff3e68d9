"""Packed attention on our own Triton kernels: GQA, shared prefixes, window, softcap, any head size up to 256."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.attention_backward_kernels import (
    attention_delta_kernel,
    attention_key_gradient_kernel,
    attention_query_gradient_kernel,
)
from slothrl_kernels.attention_blocks import key_blocks, query_blocks
from slothrl_kernels.attention_config import AttentionConfig, AttentionLaunch, attention_config
from slothrl_kernels.attention_forward_kernel import attention_forward_kernel
from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.packed_layout import PackedLayout
from slothrl_kernels.switch import interpreted, processors

LOG2E = 1.4426950408889634


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule, config: AttentionConfig | None = None
) -> Tensor:
    """`packed_attention` on checked arguments; float32, bfloat16 or float16. config: other tiles, for a sweep."""
    config = config or attention_config(q.device, _width(q), q.dtype)
    return _TritonAttention.apply(q, k, v, layout, rule, config)  # pyright: ignore


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule, config: AttentionConfig
    ) -> Tensor:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = _forward(q, k, v, layout, rule, config.forward)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = layout, rule, config
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        layout, rule, config = ctx.how
        gradient = gradient.contiguous()
        delta = _delta(out, gradient)
        wanted_q, wanted_k, wanted_v = ctx.needs_input_grad[:3]
        dq = _query_gradient(q, k, v, gradient, lse, delta, layout, rule, config.query) if wanted_q else None
        dk = dv = None
        if wanted_k or wanted_v:
            dk, dv = _key_gradients(q, k, v, gradient, lse, delta, layout, rule, config.key)
        return dq, dk, dv, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule, launch: AttentionLaunch
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, d) and lse (Hq, T), float32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.size(1), q.size(0), dtype=torch.float32, device=q.device)
    blocks = query_blocks(layout, launch.block_m)
    numbers = {**_numbers(rule), **_constants(q), **launch.options()}
    with torch.cuda.device_of(q):
        attention_forward_kernel[(len(blocks) * q.size(1),)](
            q, k, v, out, lse, blocks, layout.position_ids, *_strides(q, k, v, out), q.size(0), q.size(1),
            q.size(1) // k.size(1), head_size=q.size(2), **numbers,
        )  # fmt: skip
    return out, lse


def _delta(out: Tensor, gradient: Tensor) -> Tensor:
    """rowsum(dO * O) as (Hq, T), float32; both contiguous."""
    tokens, heads, head_size = out.shape
    delta = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    block = 32
    with torch.cuda.device_of(out):
        attention_delta_kernel[(-(-tokens // block) * heads,)](
            out, gradient, delta, *out.stride()[:2], tokens, heads, head_size, BLOCK=block, WIDTH=_width(out)
        )  # fmt: skip
    return delta


def _query_gradient(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, lse: Tensor, delta: Tensor, layout: PackedLayout, rule: Rule,
    launch: AttentionLaunch,
) -> Tensor:  # fmt: skip
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = query_blocks(layout, launch.block_m)
    numbers = {**_numbers(rule), **_constants(q), **launch.options()}
    with torch.cuda.device_of(q):
        attention_query_gradient_kernel[(len(blocks) * q.size(1),)](
            q, k, v, gradient, lse, delta, dq, blocks, layout.position_ids, *_strides(q, k, v, gradient), q.size(0),
            q.size(1), q.size(1) // k.size(1), scale=rule.scale, head_size=q.size(2), **numbers,
        )  # fmt: skip
    return dq


def _key_gradients(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, lse: Tensor, delta: Tensor, layout: PackedLayout, rule: Rule,
    launch: AttentionLaunch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    blocks, part_rows = key_blocks(layout, launch.block_n, launch.block_m, rule.window)
    group = q.size(1) // k.size(1)
    splits = _splits(group, len(blocks) * k.size(1), q.device)
    dtype = q.dtype if splits == 1 else torch.float32
    dk, dv = (torch.empty(splits, *k.shape, dtype=dtype, device=q.device) for _ in range(2))
    parts = [torch.empty(splits, part_rows, *k.shape[1:], dtype=torch.float32, device=q.device) for _ in range(2)]
    numbers = {**_numbers(rule), **_constants(q), **launch.options()}
    with torch.cuda.device_of(q):
        attention_key_gradient_kernel[(len(blocks) * k.size(1) * splits,)](
            q, k, v, gradient, lse, delta, dk, dv, *parts, blocks, layout.position_ids, *_strides(q, k, v, gradient),
            *dk.stride()[1:3], q.size(0), part_rows, q.size(1), group, splits, scale=rule.scale, head_size=q.size(2),
            **numbers,
        )  # fmt: skip
    return _add_parts(dk, parts[0], layout, q.dtype), _add_parts(dv, parts[1], layout, q.dtype)


def _add_parts(gradient: Tensor, parts: Tensor, layout: PackedLayout, dtype: torch.dtype) -> Tensor:
    """(splits, T, Hkv, d), and (splits, parts of all shared tokens, Hkv, d) -> (T, Hkv, d)."""
    total = gradient[0] if gradient.size(0) == 1 else gradient.sum(0).to(dtype)
    if layout.has_parents:
        places = layout.prefix_tokens
        shared = parts.reshape(-1, len(places), *parts.shape[2:]).sum(0)
        total.index_copy_(0, places, shared.to(dtype))
    return total


def _splits(group: int, programs: int, device: torch.device) -> int:
    """The fewest programs a key head, of the divisors of its group, that keep the processors busy; all if none do."""
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if programs * n >= 2 * processors(device)), group)


def _strides(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[int]:
    return [stride for x in (q, k, v, out) for stride in x.stride()[:2]]


def _numbers(rule: Rule) -> dict[str, Any]:
    """The kernels' arguments for a rule; see attention_tiles.py for inner and outer."""
    if rule.softcap is None:
        inner, outer = 1.0, rule.scale * LOG2E
    else:
        inner, outer = rule.scale / rule.softcap, rule.softcap * LOG2E
    window = {"window": rule.window or 0, "WINDOW": rule.window is not None}
    return {"inner": inner, "outer": outer, "SOFTCAP": rule.softcap is not None, **window}


def _constants(q: Tensor) -> dict[str, Any]:
    width = _width(q)
    return {"WIDTH": width, "EVEN": width == q.size(2), "INTERPRETED": interpreted()}


def _width(q: Tensor) -> int:
    """The head size as a tile holds it: a power of two, at least tensor cores' 16."""
    return max(16, 1 << (q.size(2) - 1).bit_length())
