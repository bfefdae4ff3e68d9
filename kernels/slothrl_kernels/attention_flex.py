"""Packed attention on torch's FlexAttention: a block mask from the layout, the softcap as a score function."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.packed_layout import PackedLayout

BLOCK = 128


def flex_packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule) -> Tensor:
    """`packed_attention` on checked arguments. Compiled on CUDA, tens of seconds once a kind; a CPU has no backward."""
    softcap = rule.softcap or 0.0

    def cap(value: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(value / softcap)

    run = _compiled() if q.is_cuda else flex_attention
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, d)
    out = run(
        queries,
        keys,
        values,
        score_mod=cap if softcap else None,
        block_mask=flex_mask(layout, rule.window),
        scale=rule.scale,
        enable_gqa=q.size(1) != k.size(1),
    )
    return out[0].transpose(0, 1)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def flex_mask(layout: PackedLayout, window: int | None) -> BlockMask:
    """Which blocks of queries and keys meet, found 16 blocks of queries at a time: never (T, T) at once."""

    def make() -> BlockMask:
        segments, parents, positions = _token_tables(layout)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (segments[query] == segments[key]) & (positions[key] <= positions[query])
            seen = own | (parents[query] == segments[key])
            return seen if window is None else seen & (positions[key] > positions[query] - window)

        blocks = -(-layout.tokens // BLOCK)
        places = torch.arange(blocks * BLOCK, device=layout.device)
        partial, full = [], []
        for rows in places.split(16 * BLOCK):
            inside = (rows[:, None] < layout.tokens) & (places < layout.tokens)
            last = layout.tokens - 1
            seen = visible(rows, rows, rows[:, None].clamp(max=last), places.clamp(max=last)) & inside
            count = seen.view(-1, BLOCK, blocks, BLOCK).sum((1, 3))
            partial.append((count > 0) & (count < BLOCK * BLOCK))
            full.append(count == BLOCK * BLOCK)
        lists = [*_ordered(torch.cat(partial)), *_ordered(torch.cat(full))]
        return BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(layout.tokens, layout.tokens)
        )

    return layout.derived(("flex", window), make)


def _token_tables(layout: PackedLayout) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) each: a token's segment, its parent segment or -1, its position."""
    lengths = torch.tensor(layout.lengths)
    segments = torch.arange(len(lengths)).repeat_interleave(lengths)
    parents = torch.tensor(layout.parents).repeat_interleave(lengths)
    return segments.to(layout.device), parents.to(layout.device), layout.position_ids


def _ordered(meets: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, blocks) bool -> how many key blocks each query block meets, and which, in front; (1, 1, ...) int32."""
    order = meets.to(torch.int32).argsort(dim=1, descending=True, stable=True)
    return meets.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()
