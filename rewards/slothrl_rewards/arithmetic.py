"""A graded reward for "a + b": dense enough that a small model learns from its first steps."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from .number import as_number, bare_number, find_numbers
from .ranges import ranged
from .text import Completion, completion_text


@ranged(0.0, 1.0)
def arithmetic(
    prompts: list[Any], completions: list[Completion], answer: list[Any], **kwargs: Any
) -> list[float | None]:
    """Reward the bare number most, and a step on the way to it a little.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        answer: one a completion; numbers or strings that hold one.

    Returns:
        1.0 the completion is exactly the number; 0.3 it is one bare number, but a wrong one; 0.2 the right number
        appears in other text; 0.0 otherwise; None where `answer` is None or holds no number.

    Raises:
        ValueError: `answer` and `completions` differ in length.
    """
    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        wanted = None if expected is None else as_number(expected)
        scores.append(None if wanted is None else _score(completion_text(completion), wanted))
    return scores


def _score(text: str, wanted: Decimal) -> float:
    bare = bare_number(text)
    if bare is not None:
        return 1.0 if bare == wanted else 0.3
    return 0.2 if wanted in find_numbers(text) else 0.0
