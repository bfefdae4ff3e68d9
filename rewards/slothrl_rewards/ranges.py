"""What a reward function says of itself: the range of its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def ranged(low: float, high: float) -> Callable[[Function], Function]:
    """Note the documented range on a function, as its attribute `reward_range`.

    `python -m slothrl reward` warns of scores outside it, and takes `high` for the full score. Any function may have
    the attribute; nothing else reads it.

    Args:
        low: lowest score.
        high: highest score.

    Returns:
        A decorator that gives the function itself back.
    """

    def mark(function: Function) -> Function:
        setattr(function, "reward_range", (low, high))  # noqa: B010 - plain assignment is a type error
        return function

    return mark
