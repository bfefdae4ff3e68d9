r"""Generated exact mathematics in five levels, and problems of MATH's shape from elsewhere. Standard library only."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from slothrl.errors import UserError

Row = dict[str, Any]
Problem = tuple[str, str, str]  # kind, prompt, answer in LaTeX

_PATIENCE = 5000  # draws in a row without a new problem after which the space counts as used up
_QUESTIONS = ("problem", "question", "prompt")
_ANSWERS = ("answer", "final_answer", "solution")


def math_problems(size: int, seed: int, levels: Iterable[int] = (1, 2, 3)) -> list[Row]:
    r"""Problems with one exact answer, in LaTeX where it is no whole number; each problem at most once.

    Level 1: whole numbers; 2: fractions, percentages, divisors; 3: linear equations, remainders, square roots;
    4: quadratic equations, pairs of equations, series; 5: expanding, derivatives, integrals, probability.

    Args:
        size: rows wanted; fewer come back where the space has no more.
        seed: of the draws; a larger `size` with the same seed only appends rows.
        levels: some of 1 to 5, taken in turn.

    Returns:
        Rows {"prompt": text, "answer": "\frac{3}{4}", "level": 2, "kind": "fractions"}.

    Raises:
        UserError: `levels` holds something else, or nothing.
    """
    chosen: list[Any] = (
        list(dict.fromkeys(levels)) if isinstance(levels, Iterable) and not isinstance(levels, str) else [levels]
    )
    if not chosen or any(isinstance(level, bool) or level not in _LEVELS for level in chosen):
        raise UserError(f"data.task.levels must be some of {', '.join(map(str, _LEVELS))}; not {chosen}")
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: list[Row] = []
    failures = 0
    while len(rows) < size and failures < _PATIENCE:
        level = chosen[len(rows) % len(chosen)]
        kind, prompt, answer = rng.choice(_LEVELS[level])(rng)
        if prompt in seen:
            failures += 1
            continue
        failures = 0
        seen.add(prompt)
        rows.append({"prompt": prompt, "answer": answer, "level": level, "kind": kind})
    return rows


def problem_rows(rows: Iterable[Mapping[str, Any]], where: str) -> list[Row]:
    """Rows of MATH's shape with the columns prompt and answer; the other columns stay.

    Args:
        rows: each with a problem (also: question, prompt) and an answer (also: final_answer, or a solution that ends
            in its answer).
        where: what messages call the source.

    Raises:
        UserError: a row without either.
    """
    made = []
    for number, row in enumerate(rows, 1):
        question = next((row[name] for name in _QUESTIONS if row.get(name)), None)
        answer = next((row[name] for name in _ANSWERS if row.get(name) not in (None, "")), None)
        if question is None or answer is None:
            shape = "a problem (or question) and an answer (or solution)"
            raise UserError(f"{where}, row {number}: data=math needs {shape}; use data=file for other data")
        made.append({**row, "prompt": question, "answer": str(answer)})
    return made


def latex(value: Fraction | int) -> str:
    r"""A number as LaTeX: "-3", "\frac{3}{4}"."""
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def polynomial(coefficients: Iterable[int | Fraction]) -> str:
    """LaTeX of a polynomial in x, highest power first: [2, 0, -1] is "2x^2 - 1"."""
    terms = list(coefficients)
    text = ""
    for power, factor in zip(range(len(terms) - 1, -1, -1), terms, strict=True):
        if factor == 0:
            continue
        sign = ("-" if factor < 0 else "") if not text else (" - " if factor < 0 else " + ")
        size = "" if abs(factor) == 1 and power else latex(abs(Fraction(factor)))
        text += (
            sign + size + ("" if power == 0 else "x" if power == 1 else f"x^{{{power}}}" if power > 9 else f"x^{power}")
        )
    return text or "0"


def _nonzero(rng: random.Random, low: int, high: int) -> int:
    return rng.choice([number for number in range(low, high + 1) if number])


def _order(rng: random.Random) -> Problem:
    a, b, c, d = (rng.randint(2, 20) for _ in range(4))
    return "order", f"Compute ${a} + {b} \\cdot {c} - {d}$.", str(a + b * c - d)


def _brackets(rng: random.Random) -> Problem:
    a, b, c = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 12)
    return "brackets", f"Compute $({a} - {b}) \\cdot {c}$.", str((a - b) * c)


def _fractions(rng: random.Random) -> Problem:
    first, second = (Fraction(rng.randint(1, 11), rng.randint(2, 12)) for _ in range(2))
    sign, value = rng.choice([("+", first + second), ("-", first - second), ("\\cdot", first * second)])
    prompt = f"Compute ${latex(first)} {sign} {latex(second)}$ and give the result in lowest terms."
    return "fractions", prompt, latex(value)


def _percent(rng: random.Random) -> Problem:
    share, whole = rng.randrange(5, 100, 5), rng.randrange(20, 500, 4)
    return "percent", f"What is ${share}\\%$ of ${whole}$?", latex(Fraction(share * whole, 100))


def _divisors(rng: random.Random) -> Problem:
    factor = rng.randint(2, 12)
    a, b = factor * rng.randint(2, 20), factor * rng.randint(2, 20)
    if rng.random() < 0.5:
        return "divisors", f"What is the greatest common divisor of ${a}$ and ${b}$?", str(math.gcd(a, b))
    return "divisors", f"What is the least common multiple of ${a}$ and ${b}$?", str(math.lcm(a, b))


def _linear(rng: random.Random) -> Problem:
    a, c = rng.sample([number for number in range(-9, 10) if number], 2)
    b, d = rng.randint(-20, 20), rng.randint(-20, 20)
    prompt = f"Solve ${polynomial([a, b])} = {polynomial([c, d])}$ for $x$."
    return "linear", prompt, latex(Fraction(d - b, a - c))


def _remainder(rng: random.Random) -> Problem:
    base, power, modulus = rng.randint(2, 12), rng.randint(5, 40), rng.randint(3, 19)
    prompt = f"What is the remainder when ${base}^{{{power}}}$ is divided by ${modulus}$?"
    return "remainder", prompt, str(pow(base, power, modulus))


def _root(rng: random.Random) -> Problem:
    outside, inside = rng.randint(2, 12), rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 14, 15])
    prompt = f"Write $\\sqrt{{{outside**2 * inside}}}$ as $a\\sqrt{{b}}$ with the smallest whole number $b$."
    return "root", prompt, f"{outside}\\sqrt{{{inside}}}"


def _quadratic(rng: random.Random) -> Problem:
    roots = [Fraction(_nonzero(rng, -9, 9), rng.choice([1, 1, 2])), Fraction(_nonzero(rng, -9, 9))]
    factor = roots[0].denominator
    terms = [factor, -factor * sum(roots), factor * roots[0] * roots[1]]
    answer = ", ".join(latex(root) for root in sorted(set(roots)))
    return "quadratic", f"Find all solutions of ${polynomial(terms)} = 0$, as a set.", f"\\{{{answer}\\}}"


def _pair(rng: random.Random) -> Problem:
    x, y = rng.randint(-9, 9), rng.randint(-9, 9)
    a, b, c, d = (_nonzero(rng, -6, 6) for _ in range(4))
    if a * d == b * c:
        return _pair(rng)
    lines = [f"{polynomial([p, 0])} {'-' if q < 0 else '+'} {abs(q)}y = {p * x + q * y}" for p, q in ((a, b), (c, d))]
    prompt = f"Solve ${lines[0]}$ and ${lines[1]}$. Give the solution as an ordered pair $(x, y)$."
    return "pair", prompt, f"({x}, {y})"


def _series(rng: random.Random) -> Problem:
    first, step, count = rng.randint(-10, 20), _nonzero(rng, -7, 9), rng.randint(8, 40)
    begin = ", ".join(str(first + n * step) for n in range(3))
    total = count * first + step * count * (count - 1) // 2
    return (
        "series",
        f"What is the sum of the first {count} terms of the arithmetic sequence ${begin}, \\dots$?",
        str(total),
    )


def _expand(rng: random.Random) -> Problem:
    roots = sorted(_nonzero(rng, -9, 9) for _ in range(3))
    terms = [1]
    for root in roots:
        terms = [high - root * low for high, low in zip([*terms, 0], [0, *terms], strict=True)]
    product = "".join(f"({polynomial([1, -root])})" for root in roots)
    return "expand", f"Expand ${product}$.", polynomial(terms)


def _derivative(rng: random.Random) -> Problem:
    terms = [_nonzero(rng, -9, 9), *(rng.randint(-9, 9) for _ in range(rng.randint(2, 4)))]
    powers = range(len(terms) - 1, 0, -1)
    prompt = f"What is the derivative of $f(x) = {polynomial(terms)}$?"
    return "derivative", prompt, polynomial([factor * power for factor, power in zip(terms, powers, strict=False)])


def _integral(rng: random.Random) -> Problem:
    terms, low = [_nonzero(rng, -6, 6), rng.randint(-6, 6), rng.randint(-6, 6)], rng.randint(-2, 1)
    high = low + rng.randint(1, 3)
    value = sum(Fraction(f * (high ** (p + 1) - low ** (p + 1)), p + 1) for f, p in zip(terms, (2, 1, 0), strict=True))
    return "integral", f"Compute $\\int_{{{low}}}^{{{high}}} ({polynomial(terms)}) \\, dx$.", latex(value)


def _probability(rng: random.Random) -> Problem:
    red, blue = rng.randint(2, 12), rng.randint(2, 12)
    drawn = rng.randint(2, min(4, red))
    prompt = (
        f"A bag holds {red} red and {blue} blue balls. {drawn} balls are drawn at random without putting any back. "
        "What is the probability that all of them are red?"
    )
    return "probability", prompt, latex(Fraction(math.comb(red, drawn), math.comb(red + blue, drawn)))


_LEVELS: dict[int, list[Callable[[random.Random], Problem]]] = {
    1: [_order, _brackets],
    2: [_fractions, _percent, _divisors],
    3: [_linear, _remainder, _root],
    4: [_quadratic, _pair, _series],
    5: [_expand, _derivative, _integral, _probability],
}
