"""Short questions whose answers must come in tags: the task is the form. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_PATIENCE = 5000  # draws in a row without a new question after which the space counts as used up
_WORDS = (
    "garden planet silver window market bridge summer letter forest animal kitchen mountain holiday picture "
    "station library teacher village weather morning elephant umbrella notebook computer language sandwich"
)


def format_questions(size: int, seed: int) -> list[dict[str, Any]]:
    """Questions that a small model can answer, so that it can learn to answer them in the asked form.

    Args:
        size: rows wanted; fewer come back where the space has no more.
        seed: of the draws; a larger `size` with the same seed only appends rows.

    Returns:
        Rows {"prompt": "What is 7 plus 12?", "answer": "19"}; all answers are whole numbers.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    failures = 0
    while len(rows) < size and failures < _PATIENCE:
        prompt, answer = rng.choice(_KINDS)(rng)
        if prompt in seen:
            failures += 1
            continue
        failures = 0
        seen.add(prompt)
        rows.append({"prompt": prompt, "answer": str(answer)})
    return rows


def _sum(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(1, 50), rng.randint(1, 50)
    return f"What is {a} plus {b}?", a + b


def _difference(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(1, 50), rng.randint(1, 50)
    return f"Sam has {a + b} coins and gives away {b}. How many are left?", a


def _larger(rng: random.Random) -> tuple[str, int]:
    numbers = rng.sample(range(10, 1000), 3)
    return f"Which is the largest of {numbers[0]}, {numbers[1]} and {numbers[2]}?", max(numbers)


def _letters(rng: random.Random) -> tuple[str, int]:
    word = rng.choice(_WORDS.split())
    letter = rng.choice(word)
    return f'How often does the letter "{letter}" occur in "{word}"?', word.count(letter)


def _next(rng: random.Random) -> tuple[str, int]:
    first, step = rng.randint(1, 20), rng.randint(2, 9)
    row = ", ".join(str(first + n * step) for n in range(4))
    return f"Which number comes next: {row}?", first + 4 * step


_KINDS: list[Callable[[random.Random], tuple[str, int]]] = [_sum, _difference, _larger, _letters, _next]
