"""What tests of packed attention share: layouts, values, rows on their own as the oracle."""

import torch
from slothrl_kernels import PackedLayout

TREE = ([5, 3, 40, 4, 33, 2], [-1, 0, 0, -1, -1, 4])  # odd lengths, a prefix of several tiles, one with a short child
LAYOUTS = {"one": ([37], None), "rows": ([1, 20, 17, 33], None), "tree": TREE}


def values(layout, heads, head_size, dtype=torch.float32, device="cpu"):
    """q, k, v with heads (query heads, key heads), and a gradient of the output."""
    generator = torch.Generator().manual_seed(layout.tokens + head_size)
    shapes = [(layout.tokens, n, head_size) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def rows_of(layout: PackedLayout) -> list[tuple[torch.Tensor, int]]:
    """Each segment as the row it would be alone: the places of its prefix and its own, and how many are prefix."""
    rows = []
    for i, parent in enumerate(layout.parents):
        places = [torch.arange(layout.starts[s], layout.starts[s + 1]) for s in ((parent,) if parent >= 0 else ())]
        own = torch.arange(layout.starts[i], layout.starts[i + 1])
        rows.append((torch.cat([*places, own]), sum(map(len, places))))
    return rows


def attention_by_rows(q, k, v, layout, scale=None, window=None, softcap=None):
    """Dense attention with a mask over every row alone, prefixes repeated; as `packed_attention` should be."""
    group, out = q.size(1) // k.size(1), torch.empty_like(q)
    for places, prefix in rows_of(layout):
        places = places.to(q.device)
        queries, keys, vals = q[places], k[places].repeat_interleave(group, 1), v[places].repeat_interleave(group, 1)
        scores = torch.einsum("nhd,mhd->hnm", queries, keys) * (q.size(2) ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        behind = torch.arange(len(places), device=q.device)[:, None] - torch.arange(len(places), device=q.device)
        seen = (behind >= 0) & (behind < (len(places) if window is None else window))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = out.index_put((places[prefix:],), torch.einsum("hnm,mhd->nhd", weights, vals)[prefix:])
    return out
