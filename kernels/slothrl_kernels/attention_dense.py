"""Packed attention by torch's dense `scaled_dot_product_attention`, for packs that are a batch of equal rows.

cuDNN's attention, the fastest on data-center GPUs, takes dense batches. Segments of one length without parents are one:
no byte moves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.packed_layout import PackedLayout

# In the order of their speed; the first that takes the shapes runs. MATH takes all, with all scores in memory.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def is_dense(layout: PackedLayout) -> bool:
    """Whether the pack is a batch: segments of one length, and none has a parent."""
    return not layout.has_parents and len(set(layout.lengths)) == 1


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule) -> Tensor:
    """`packed_attention` on checked arguments, of a layout that `is_dense`, without window and softcap."""
    rows = len(layout.lengths)
    queries, keys, values = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))  # (S, H, n, d)
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=rule.scale, enable_gqa=q.size(1) != k.size(1)
        )
    return out.transpose(1, 2).flatten(0, 1)
