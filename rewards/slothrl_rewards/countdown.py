"""Countdown: reach the target with + - * / from the given numbers. Parsed with `ast`, computed in fractions."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .ranges import ranged
from .text import Completion, completion_text, inside_tag

# Bounds the parser's and our own recursion, and the size of the integers.
MAX_CHARS = 200

# What an expression can be made of; a point only between digits, so that a sentence may end after one.
_RUN = re.compile(r"(?:[0-9+\-*/() \t]|(?<=[0-9])\.(?=[0-9]))+")
_TYPESET = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"}
# A run glued to one of these is part of something else: "x2 + 3", "2^3 + 4", "(3 + 1)!".
_GLUE = "_^%!"
_OPERATION = re.compile(r"[0-9)]\s*[-+*/]+\s*[0-9(]")


@ranged(0.0, 1.0)
def countdown(
    prompts: list[Any], completions: list[Completion], numbers: list[Any], target: list[Any], **kwargs: Any
) -> list[float | None]:
    """Judge the completion's last arithmetic expression, or the `<answer>` tag's if there is one.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        numbers: one list of integers a completion, each to be used exactly once.
        target: one integer a completion.

    Returns:
        1.0 the expression uses the numbers and equals the target; 0.1 it is well-formed, but wrong; 0.0 otherwise;
        None where `numbers` or `target` is None.

    Raises:
        ValueError: the columns and `completions` differ in length.
    """
    return [
        None if given is None or goal is None else _score(completion_text(completion), given, goal)
        for completion, given, goal in zip(completions, numbers, target, strict=True)
    ]


def last_expression(text: str, bare: bool = False) -> str | None:
    """The last arithmetic expression in `text`, as written; None if there is none.

    Args:
        text: "(3 + 5) * 2 = 16" holds the expression "(3 + 5) * 2".
        bare: a single number counts as an expression too.
    """
    for symbol, operator in _TYPESET.items():
        text = text.replace(symbol, operator)
    last = None
    for match in _RUN.finditer(text):
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        expression = match.group().strip().strip("*").strip()  # **bold**; no expression begins or ends with a star
        if before in ("", "\n"):
            expression = expression.removeprefix("- ")  # a list's dash
        if _is_glued(before, match.group(), after):
            continue
        if _OPERATION.search(expression) or (bare and any(char.isdigit() for char in expression)):
            last = expression
    return last


def _is_glued(before: str, run: str, after: str) -> bool:
    left = not run[0].isspace() and (before.isalnum() or before in (*_GLUE, "."))
    return left or (not run[-1].isspace() and (after.isalnum() or after in tuple(_GLUE)))


def evaluate(expression: str) -> tuple[Fraction | None, list[int]]:
    """Compute an expression of integers, + - * / and parentheses.

    Returns:
        The value (None after a division by zero) and the integers used, in order.

    Raises:
        ValueError: anything else is in it, or it has more than MAX_CHARS characters.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"an expression has at most {MAX_CHARS} characters")
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"not an expression: {expression!r}") from error
    used: list[int] = []
    return _value(tree.body, used), used


def _value(node: ast.expr, used: list[int]) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        raise ValueError(f"not allowed in an expression: {type(node).__name__}")
    left, right = _value(node.left, used), _value(node.right, used)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    return left / right if right else None


def _score(text: str, numbers: Sequence[Any], target: Any) -> float:
    tagged = inside_tag(text, "answer")
    expression = last_expression(text if tagged is None else tagged, bare=len(numbers) == 1)
    if expression is None:
        return 0.0
    try:
        value, used = evaluate(expression)
    except ValueError:
        return 0.0
    right = value == Fraction(target) and Counter(used) == Counter(int(number) for number in numbers)
    return 1.0 if right else 0.1
