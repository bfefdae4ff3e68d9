"""Rows copied into a wider buffer, 16 bytes at a time: torch copies what is not in one piece value by value."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = torch.complex128  # the largest element that torch copies as it is


def copy_rows(out: Tensor, x: Tensor) -> Tensor:
    """x (..., K) into out (..., K), bit by bit; either may be part of a wider tensor, or in another order.

    Args:
        out, x: of one dtype and device. Where their rows begin at and have multiples of 16 bytes, they move as words.

    Returns:
        `out`.

    Raises:
        RuntimeError: shapes that do not fit.
    """
    values = WORD.itemsize // x.element_size()
    if x.dtype == out.dtype and x.shape == out.shape and x.is_floating_point() and _fits(out, values, x):
        out.view(WORD).copy_(x.view(WORD))
        return out
    return out.copy_(x)


def _fits(out: Tensor, values: int, x: Tensor) -> bool:
    """Whether both are rows of whole words, `values` of theirs each."""
    if x.dim() < 2 or x.size(-1) % values:
        return False
    for t in (out, x):
        if t.stride(-1) != 1 or any(step % values for step in t.stride()[:-1]):
            return False
        if t.storage_offset() % values or t.data_ptr() % WORD.itemsize:
            return False
    return True
