"""TRL's batches: dictionaries of tensors with a row a completion, cut and put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]

# A row a completion; whatever else a batch holds belongs to all of them.
ROWS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages")
ROWS += ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio")


def join(batches: Sequence[Batch]) -> Batch:
    """Slices of one generation batch, one under the other."""
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in ROWS if batches[0].get(name) is not None}
    return {**batches[0], **rows}


def select(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, by index (R,)."""
    return {**batch, **{name: batch[name][rows] for name in ROWS if batch.get(name) is not None}}


def loss_mask(batch: Batch) -> Tensor:
    """(B, T) int: the completion tokens that the policy wrote; those of tools are not."""
    return batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]


def whole_ids(batch: Batch) -> Tensor:
    """(B, P + T) prompts and completions."""
    return torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)


# What padding holds, where it is not 0.
_PADDING = {"tool_mask": 1, "importance_sampling_ratio": 1}


def replace_rows(batch: Batch, places: Tensor, other: Batch, rows: Tensor, pad_token_id: int) -> Batch:
    """Put rows of another batch into places of this one; whichever is narrower is padded.

    Args:
        places: (R,) rows of `batch` to overwrite.
        rows: (R,) rows of `other` to take.
    """
    found = dict(batch)
    for name in ROWS:
        if batch.get(name) is None:
            continue
        mine, theirs = batch[name], other[name]
        if mine.dim() > 1:
            padding = pad_token_id if name.endswith("_ids") else _PADDING.get(name, 0)
            width = max(mine.size(1), theirs.size(1))
            mine, theirs = (_padded(x, width, padding, left=name.startswith("prompt")) for x in (mine, theirs))
        found[name] = mine.index_copy(0, places, theirs[rows])
    return found


def _padded(values: Tensor, width: int, padding: float, left: bool) -> Tensor:
    more = width - values.size(1)
    return torch.nn.functional.pad(values, (more, 0) if left else (0, more), value=padding)
