"""The work of the attention kernels as tables of int32, eight a program, worked out once for a layout on the host.

Long programs come first, so that short ones fill the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl_kernels.packed_layout import PackedLayout

PART = 1024  # children's queries from which a shared prefix's gradient is summed in parts
MOST_PROGRAMS = 16  # families * parts: with many families there is enough to do at once


def query_blocks(layout: PackedLayout, block: int) -> Tensor:
    """(programs, 8): first query, end of its segment, start of its segment, position of token t minus t, and the
    parent's first token and end (both 0 without a parent)."""

    def make() -> Tensor:
        rows = []
        for i, parent in enumerate(layout.parents):
            start, end = layout.starts[i : i + 2]
            first, last = (layout.starts[parent], layout.starts[parent + 1]) if parent >= 0 else (0, 0)
            shift = last - first - start
            for row in range(start, end, block):
                keys = last - first + min(row + block, end) - start
                rows.append((keys, row, end, start, shift, first, last))
        return _table(rows, layout)

    return layout.derived(("query_blocks", block), make)


def key_blocks(layout: PackedLayout, block: int, query_block: int, window: int | None) -> tuple[Tensor, int]:
    """(programs, 8): first key, end of its segment, position of token t minus t, first and last query, the query up to
    which masks are needed, and the row of the parts that takes the result (-1: none, the gradient itself does).

    Also the rows of all parts together: for each shared prefix token one for its own segment's queries, then one for
    each stretch of its children's.
    """

    def make() -> tuple[Tensor, int]:
        shared = {first: (begin, end) for first, begin, end in layout.families}
        shared_tokens = sum(begin - first for first, (begin, _) in shared.items())
        longest = max((end - begin for begin, end in shared.values()), default=0)
        parts = max(1, min(-(-longest // PART), MOST_PROGRAMS // max(1, len(shared)))) if shared else 0
        rows, before = [], 0
        for i, parent in enumerate(layout.parents):
            start, end = layout.starts[i : i + 2]
            shift = (layout.lengths[parent] if parent >= 0 else 0) - start
            stretches = _stretches(*shared[start], parts, query_block) if start in shared else []
            for key in range(start, end, block):
                last = end if window is None else min(end, key + block - 1 + window)
                masked = min(end, key + block) if window is None else last
                slot = before + key - start if stretches else -1
                rows.append((last - key, key, end, shift, key, last, masked, slot))
                for part, (first, last) in enumerate(stretches, 1):
                    masked = first if window is None else max(first, last)
                    rows.append((last - first, key, end, shift, first, last, masked, slot + part * shared_tokens))
            before += end - start if stretches else 0
        return _table(rows, layout), (parts + 1) * shared_tokens

    return layout.derived(("key_blocks", block, query_block, window), make)


def _stretches(begin: int, end: int, parts: int, query_block: int) -> list[tuple[int, int]]:
    """begin..end cut into `parts`, whole blocks but for the last; some may be empty, and write zeros all the same."""
    size = -(-(end - begin) // (parts * query_block)) * query_block
    return [(begin + i * size, min(begin + (i + 1) * size, end)) for i in range(parts)]


def _table(rows: list[tuple[int, ...]], layout: PackedLayout) -> Tensor:
    """Rows without their first entry, the work, by which they are sorted."""
    rows = sorted(rows, key=lambda row: -row[0])
    return torch.tensor([(*row[1:], *[0] * (9 - len(row))) for row in rows], dtype=torch.int32).to(layout.device)
