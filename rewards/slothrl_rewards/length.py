"""Discourage completions that run into the length limit."""

from __future__ import annotations

from typing import Any

from .ranges import ranged
from .text import Completion, completion_text


@ranged(-1.0, 0.0)
def length_penalty(
    prompts: list[Any],
    completions: list[Completion],
    completion_ids: list[list[int]] | None = None,
    max_length: int = 256,
    soft: int = 64,
    **kwargs: Any,
) -> list[float | None]:
    """DAPO's soft overlong punishment (Yu et al., 2025, eq. 13).

    Args:
        prompts: unused.
        completions: strings or chat messages.
        completion_ids: token ids, which the trainer gives; without them words are counted.
        max_length: length from which on the penalty is full; normally `trainer.max_completion_length`.
        soft: length of the slope before `max_length`; 0 makes it a step.

    Returns:
        In [-1, 0] each: 0 up to `max_length - soft`, then falling linearly to -1 at `max_length`, -1 beyond.

    Raises:
        ValueError: not 0 <= soft <= max_length.
    """
    if not 0 <= soft <= max_length:
        raise ValueError(f"length_penalty needs 0 <= soft <= max_length, not soft={soft}, max_length={max_length}")
    if completion_ids is None:
        lengths = [len(completion_text(completion).split()) for completion in completions]
    else:
        lengths = [len(ids) for ids in completion_ids]
    return [_penalty(length, max_length, soft) for length in lengths]


def _penalty(length: int, max_length: int, soft: int) -> float:
    if length > max_length:
        return -1.0
    over = length - (max_length - soft)
    return -over / soft if over > 0 else 0.0
