"""Numbers in text, compared as numbers. Decimal throughout: exact, and free of Python's int-conversion limit."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from .ranges import ranged
from .text import Completion, completion_text

# Longer tokens are no number anybody meant; parsing them would only cost time.
MAX_CHARS = 1000

# A sign belongs to the number only where nothing is there to subtract from: "5-3" holds 5 and 3, "= -3" holds -3.
NUMBER = (
    r"(?:(?<![\w.)\]])[-+])?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_NUMBER = re.compile(NUMBER, re.ASCII)


def find_numbers(text: str) -> list[Decimal | None]:
    """Every number in `text`, in order; None stands for one of more than MAX_CHARS characters."""
    return [_to_decimal(match.group()) for match in _NUMBER.finditer(_plain_minus(text))]


def last_number(text: str) -> Decimal | None:
    """The last number in `text`.

    Args:
        text: may hold signs, thousands commas, decimals, exponents and "$"; "42." is 42.

    Returns:
        The number; None where there is none, or where the last one has more than MAX_CHARS characters.
    """
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def bare_number(text: str) -> Decimal | None:
    """The number that `text` consists of, white space at both ends aside; None if it is anything else."""
    match = _NUMBER.fullmatch(_plain_minus(text).strip())
    return _to_decimal(match.group()) if match else None


def as_number(value: Any) -> Decimal | None:
    """An answer column's value as a number: numbers as they are, of strings the last number; None if there is none."""
    if isinstance(value, int):
        return Decimal(value) if value.bit_length() <= 3 * MAX_CHARS else None
    return last_number(str(value))


@ranged(0.0, 1.0)
def number_match(
    prompts: list[Any], completions: list[Completion], answer: list[Any], tolerance: float = 1e-6, **kwargs: Any
) -> list[float | None]:
    """Compare the completion's last number with the answer.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        answer: one a completion; numbers or strings that hold one.
        tolerance: greatest absolute difference that still counts as equal.

    Returns:
        1.0 or 0.0 each; None where `answer` is None or holds no number.

    Raises:
        ValueError: `answer` and `completions` differ in length, or `tolerance` is negative or no finite number.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"number_match needs tolerance as a number from 0, not {tolerance!r}")
    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        wanted = None if expected is None else as_number(expected)
        found = last_number(completion_text(completion))
        scores.append(None if wanted is None else float(same_number(found, wanted, tolerance)))
    return scores


def same_number(found: Decimal | None, wanted: Decimal, tolerance: float = 1e-6) -> bool:
    """Whether two numbers differ by at most `tolerance`."""
    return found is not None and abs(found - wanted) <= Decimal(str(tolerance))


def _plain_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def _to_decimal(token: str) -> Decimal | None:
    return Decimal(token.replace(",", "").replace("$", "")) if len(token) <= MAX_CHARS else None
