"""The completion is the answer, character for character."""

from __future__ import annotations

from typing import Any

from .ranges import ranged
from .text import Completion, answer_text, completion_text


@ranged(0.0, 1.0)
def exact_match(
    prompts: list[Any], completions: list[Completion], answer: list[Any], **kwargs: Any
) -> list[float | None]:
    """Compare the text with the answer, white space at both ends aside.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        answer: one a completion; read through `str`.

    Returns:
        1.0 or 0.0 each; None where `answer` is None.

    Raises:
        ValueError: `answer` and `completions` differ in length.
    """
    return [
        None if expected is None else float(completion_text(completion).strip() == answer_text(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]
