"""Generated tasks: problems made from a seed, so that a run needs no data set. Standard library only."""

from __future__ import annotations

import difflib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from slothrl.errors import UserError
from slothrl.tasks_format import format_questions
from slothrl.tasks_math import math_problems

Row = dict[str, Any]

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
_PATIENCE = 5000  # countdown draws in a row without a new problem after which its space counts as used up


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a mistyped name.

    Args:
        name: what was asked for.
        names: what there is.

    Returns:
        " (did you mean 'x'?)", or "" where nothing is close.
    """
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def arithmetic(
    size: int, seed: int, digits: int = 1, operations: Iterable[str] = ("+",), min_digits: int | None = None
) -> list[Row]:
    """Sums, differences and products of two whole numbers, each problem at most once.

    Args:
        size: rows wanted; a smaller space gives every problem once, in shuffled order.
        seed: of the order; a larger `size` with the same seed only appends rows.
        digits: digits of the longest operand, 1 to 9. One digit means 0 to 9.
        operations: any of "+", "-", "*".
        min_digits: digits of the shortest operand; default: `digits`.

    Returns:
        Rows {"prompt": "3 + 4", "answer": "7", "a": 3, "b": 4, "operation": "+"}.

    Raises:
        UserError: a knob has a value that makes no problems.
    """
    digits = _whole("digits", digits, 1, 9)
    min_digits = digits if min_digits is None else _whole("min_digits", min_digits, 1, digits)
    signs = list(dict.fromkeys(map(str, operations))) if isinstance(operations, Iterable) else [str(operations)]
    unknown = [sign for sign in signs if sign not in _OPERATIONS]
    if unknown or not signs:
        raise UserError(f"data.task.operations must be some of {', '.join(_OPERATIONS)}; not {unknown or signs}")
    low = 0 if min_digits == 1 else 10 ** (min_digits - 1)
    count = 10**digits - low  # operands there are
    rows = []
    for index in _distinct(count * count * len(signs), size, random.Random(seed)):
        pair, which = divmod(index, len(signs))
        a, b = low + pair // count, low + pair % count
        sign = signs[which]
        answer = str(_OPERATIONS[sign](a, b))
        rows.append({"prompt": f"{a} {sign} {b}", "answer": answer, "a": a, "b": b, "operation": sign})
    return rows


def countdown(size: int, seed: int, numbers: int = 3, max_number: int = 20, max_target: int = 100) -> list[Row]:
    """Reach a target from some numbers, each used once; solvable, because the target comes from a solution.

    Args:
        size: rows wanted; fewer come back where the space has no more. Two problems with the same numbers
            in another order count as one.
        seed: of the draws; a larger `size` with the same seed only appends rows.
        numbers: how many numbers, 2 to 6.
        max_number: the largest of them.
        max_target: the largest target; the smallest is 1.

    Returns:
        Rows {"prompt": text, "numbers": [..], "target": 24, "answer": "(3 + 5) * 3"}.

    Raises:
        UserError: a knob is out of its range.
    """
    numbers = _whole("numbers", numbers, 2, 6)
    max_number = _whole("max_number", max_number, 1, 10**6)
    max_target = _whole("max_target", max_target, 1, 10**9)
    rng = random.Random(seed)
    seen: set[tuple[int, ...]] = set()
    rows: list[Row] = []
    failures = 0
    while len(rows) < size and failures < _PATIENCE:
        drawn = [rng.randint(1, max_number) for _ in range(numbers)]
        target, expression = _combine(drawn, rng)
        key = (*sorted(drawn), target)
        if not 1 <= target <= max_target or key in seen:
            failures += 1
            continue
        failures = 0
        seen.add(key)
        prompt = (
            f"Using the numbers {', '.join(map(str, drawn))}, write an expression that equals {target}. "
            "Use each number exactly once, with +, -, *, / and parentheses."
        )
        rows.append({"prompt": prompt, "numbers": drawn, "target": target, "answer": expression})
    return rows


TASKS: dict[str, Callable[..., list[Row]]] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "math": math_problems,
    "format": format_questions,
}


def check_knobs(source: str, task: Iterable[str]) -> None:
    """Refuses knobs that a task does not have.

    Args:
        source: a name in `TASKS`.
        task: the names of the knobs.

    Raises:
        UserError: an unknown knob; the message lists the valid ones.
    """
    knobs = [name for name in inspect.signature(TASKS[source]).parameters if name not in ("size", "seed")]
    for name in task:
        if name not in knobs:
            hint = nearest(name, knobs)
            raise UserError(f"data.task.{name} is no knob of {source}{hint}; its knobs: {', '.join(knobs)}")


def generate(source: str, size: int, eval_size: int, seed: int, **task: Any) -> tuple[list[Row], list[Row]]:
    """Training and held-out problems of a generated task, with no problem in both.

    The held-out rows come first out of the seed, so they stay the same whatever `size` is.

    Args:
        source: a name in `TASKS`.
        size: training rows wanted; a small space gives what is left beside the held-out rows.
        eval_size: held-out rows, always exactly as many.
        seed: of the problems and of their order.
        **task: the task's own knobs.

    Returns:
        (training rows, held-out rows).

    Raises:
        UserError: unknown task or knob, bad value, or fewer than eval_size + 1 different problems.
    """
    if source not in TASKS:
        raise UserError(f"no generated task '{source}'{nearest(source, TASKS)}; data.source has: {', '.join(TASKS)}")
    if size < 1 or eval_size < 0:
        raise UserError("data.train_size must be at least 1 and data.eval_size at least 0")
    check_knobs(source, task)
    rows = TASKS[source](size + eval_size, seed, **task)
    if len(rows) <= eval_size:
        raise UserError(
            f"{source} has only {len(rows)} different problems, which leaves none to train on beside "
            f"data.eval_size={eval_size}: lower data.eval_size or widen the task with data.task"
        )
    return rows[eval_size:], rows[:eval_size]


def _whole(knob: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"data.task.{knob} must be a whole number from {low} to {high}, not {value!r}")
    return value


def _distinct(space: int, size: int, rng: random.Random) -> Iterator[int]:
    """`min(size, space)` different numbers below `space`; a larger size only appends to a smaller one's."""
    moved: dict[int, int] = {}  # a Fisher-Yates shuffle that stores only the swapped places: space may be 10^18
    for place in range(min(size, space)):
        other = rng.randrange(place, space)
        yield moved.get(other, other)
        moved[other] = moved.get(place, place)


def _combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """Joins the numbers two by two with random operations until one value is left; every step is a whole number."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        a, left = terms.pop(rng.randrange(len(terms)))
        b, right = terms.pop(rng.randrange(len(terms)))
        sign = rng.choice("+-*/")
        if sign == "/":
            if b != 0 and a % b == 0:
                terms.append((a // b, f"({left} / {right})"))
                continue
            sign = "+"  # not a whole number
        terms.append((_OPERATIONS[sign](a, b), f"({left} {sign} {right})"))
    value, expression = terms[0]
    return value, expression[1:-1]  # without the outermost parentheses
