"""Attention over a pack: many sequences in one row without padding, completions beside their shared prompt.

A token at position p of segment s, with s continuing segment r (or nothing), attends to

    the tokens of s at positions <= p, and all tokens of r, in both only at positions > p - window.

As if each child were a row of its own with its prefix before it: softmax(scale q K^T) V over those keys, and with a
softcap c (Gemma 2, arXiv:2408.00118) of c tanh(scale q K^T / c).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl_kernels.attention_choice import IMPLS, AttentionImpl, choose, refusal
from slothrl_kernels.attention_dense import dense_attention
from slothrl_kernels.attention_flash import flash_attention
from slothrl_kernels.attention_package import package_attention
from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.packed_layout import PackedLayout
from slothrl_kernels.switch import HAS_TRITON


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: AttentionImpl = "auto",
) -> Tensor:
    """Causal attention inside each segment of the pack and to the whole of its parent; differentiable in q, k and v.

    Args:
        q: (T, Hq, d), k, v: (T, Hkv, d) of one float dtype, with Hq a multiple of Hkv (GQA: head h reads key head
            h // (Hq / Hkv)); positions already turned in (`PackedLayout.position_ids`).
        layout: the T tokens' segments and parents, on the same device.
        scale: of q k^T, above 0; None: d ** -0.5.
        window: only keys at a position > the query's - window, as transformers' sliding_window; None: all.
        softcap: scores s become softcap * tanh(s / softcap); None: as they are.
        impl: who computes it. "flash": torch's FlashAttention, a shared prefix as a second call; "flash_attn": the
            package of that name, without shared prefixes; "triton": our kernels; "sdpa": torch's dense attention,
            cuDNN's where there is one, for segments of one length without parents; "flex": FlexAttention; "torch": the
            reference. "auto": the reference off CUDA, else the fastest of the first four that serves, measured once a
            kind of call (`attention_choice.CHOICES`).

    Returns:
        (T, Hq, d) in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the layout; an impl that is unknown or
            cannot serve, with the reason.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    _check(q, k, v, layout, scale, window, softcap)
    if impl not in (*IMPLS, "auto"):
        raise ValueError(f"impl {impl!r} is not one of auto, {', '.join(IMPLS)}")
    if window is not None and window > layout.max_position:
        window = None  # it reaches everywhere
    rule = Rule(q.size(2) ** -0.5 if scale is None else scale, window, softcap)
    if impl == "auto":
        kind = ("choice", q.device, q.dtype, q.size(1), k.size(1), q.size(2), rule)
        fastest = layout.derived(kind, lambda: choose(q, k, v, layout, rule, _run))  # once for all layers
        return _run(fastest, q, k, v, layout, rule)
    if (reason := refusal(impl, q, layout, rule)) is not None:
        raise ValueError(f"impl={impl!r} cannot serve this attention: {reason}")
    return _run(impl, q, k, v, layout, rule)


def _run(impl: str, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule) -> Tensor:
    if impl == "triton":
        if not HAS_TRITON:
            raise RuntimeError("impl='triton' needs Triton; impl='torch' does not")
        from slothrl_kernels.attention_triton import triton_attention

        return triton_attention(q, k, v, layout, rule)
    if impl == "torch":
        return packed_attention_reference(q, k, v, layout, *rule)
    if impl == "flex":
        from slothrl_kernels.attention_flex import flex_packed_attention  # brings torch's compiler along

        return flex_packed_attention(q, k, v, layout, rule)
    backends = {"flash": flash_attention, "flash_attn": package_attention, "sdpa": dense_attention}
    return backends[impl](q, k, v, layout, rule)


def packed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The plain-torch truth of `packed_attention`, segment by segment; float64 too.

    Scores are rounded to the inputs' dtype and the softmax is taken in at least float32, as transformers' eager
    attention does. It keeps Hq * n * (n + parent's n) probabilities of every segment for the backward.
    """
    _check(q, k, v, layout, scale, window, softcap)
    factor = q.size(2) ** -0.5 if scale is None else scale
    rows = []
    for i, parent in enumerate(layout.parents):
        mine = slice(layout.starts[i], layout.starts[i + 1])
        keys, values, positions = k[mine], v[mine], layout.position_ids[mine]
        if parent >= 0:
            theirs = slice(layout.starts[parent], layout.starts[parent + 1])
            keys, values = torch.cat([k[theirs], keys]), torch.cat([v[theirs], values])
            positions = torch.cat([layout.position_ids[theirs], positions])
        behind = layout.position_ids[mine, None] - positions  # (n, keys)
        visible = (behind >= 0) & (behind < window) if window is not None else behind >= 0
        rows.append(_attend(q[mine], keys, values, visible, factor, softcap))
    return torch.cat(rows)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q (n, Hq, d), k and v (m, Hkv, d), visible (n, m) -> (n, Hq, d)."""
    queries = q.unflatten(1, (k.size(1), -1))  # (n, Hkv, Hq / Hkv, d): query heads beside the key head they read
    scores = torch.einsum("nhgd,mhd->hgnm", queries, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("hgnm,mhd->nhgd", weights, v).flatten(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or (q.size(0), q.size(2)) != (k.size(0), k.size(2)):
        raise ValueError(
            f"q (T, Hq, d) and k, v (T, Hkv, d) do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.size(1) == 0 or q.size(1) % k.size(1):
        raise ValueError(f"{q.size(1)} query heads are no multiple of {k.size(1)} key heads")
    if q.size(0) != layout.tokens:
        raise ValueError(f"{q.size(0)} tokens, but the layout has {layout.tokens}")
    if not q.is_floating_point() or len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must be of one float dtype on one device: {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != layout.device:
        raise ValueError(f"q is on {q.device}, the layout on {layout.device}")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be above 0, not {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
