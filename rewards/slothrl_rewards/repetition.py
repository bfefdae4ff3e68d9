"""Discourage completions that say the same again and again."""

from __future__ import annotations

import re
from typing import Any

from .ranges import ranged
from .text import Completion, completion_text

_UNITS = ("word", "character", "token")


@ranged(-1.0, 0.0)
def repetition_penalty(
    prompts: list[Any],
    completions: list[Completion],
    completion_ids: list[list[int]] | None = None,
    ngram: int = 3,
    unit: str = "word",
    max_penalty: float = -1.0,
    **kwargs: Any,
) -> list[float]:
    """The share of n-grams that are repetitions, as a penalty.

    Open-R1's form of the penalty of Yeo et al. (2025, arXiv:2502.03373).

    Args:
        prompts: unused.
        completions: strings or chat messages.
        completion_ids: token ids, which the trainer gives; for unit=token.
        ngram: units in a row that count as one; repeats of fewer are nobody's fault.
        unit: "word" (in lower case), "character" (for scripts without spaces) or "token".
        max_penalty: what a completion of nothing but repetitions would get, in [-1, 0].

    Returns:
        In [max_penalty, 0] each: max_penalty * (1 - different n-grams / n-grams); 0 where there is not even one.

    Raises:
        ValueError: a parameter is out of its range, or unit=token without `completion_ids`.
    """
    if isinstance(ngram, bool) or not isinstance(ngram, int) or ngram < 1:
        raise ValueError(f"repetition_penalty needs ngram as a whole number from 1, not {ngram!r}")
    if not -1.0 <= max_penalty <= 0.0:
        raise ValueError(f"repetition_penalty needs max_penalty from -1 to 0, not {max_penalty!r}")
    if unit not in _UNITS:
        raise ValueError(f"repetition_penalty needs unit as one of {', '.join(_UNITS)}, not {unit!r}")
    if unit == "token":
        if completion_ids is None:
            raise ValueError("repetition_penalty with unit=token needs completion_ids; use unit=word")
        return [max_penalty * repeated(ids, ngram) for ids in completion_ids]
    return [max_penalty * repeated(_units(completion_text(text), unit), ngram) for text in completions]


def repeated(units: list[Any], ngram: int) -> float:
    """The share of n-grams that were there before, in [0, 1)."""
    total = len(units) - ngram + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(units[start : start + ngram]) for start in range(total)}) / total


def _units(text: str, unit: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) if unit == "word" else [char for char in text if not char.isspace()]
