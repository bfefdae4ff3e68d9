r"""Keeps bombs away from the computer algebra: how large could this LaTeX become if somebody evaluated it?

math-verify's own time limit is an alarm that Python delivers between two bytecodes; 9^{9^9} is one bytecode. So the
answer is measured before it is parsed: length, nesting, list size, and an upper bound of its digits.
"""

from __future__ import annotations

import math
import re

MAX_CHARS = 300  # of an answer
MAX_DEPTH = 20  # brackets within brackets; the parser recurses
MAX_ITEMS = 64  # elements of sets, tuples and matrices
MAX_DIGITS = 4000.0  # of any number that evaluation could make; Python prints at most 4300

_TOKEN = re.compile(r"\d*\.\d+|\d+|\\[A-Za-z]+|\\.|[A-Za-z]|\S", re.ASCII | re.DOTALL)
_OPEN, _CLOSE = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
_SUM = {"+", "-", ",", ";", "=", "<", ">", "&", r"\\", r"\le", r"\leq", r"\ge", r"\geq", r"\pm", r"\cup", r"\in"}
_PRODUCT = {"*", "/", ":", r"\cdot", r"\times", r"\div"}
# Right ends that are no brackets to this scanner: a power behind one takes everything before it as its base.
_ENDS = {"|", r"\|", r"\right", r"\rvert", r"\rVert", r"\rfloor", r"\rceil", r"\rangle", r"\end"}
_EXPONENTIAL = {r"\exp", r"\sinh", r"\cosh", r"\tanh", r"\Gamma"}
_NO_ARGUMENT = {"", "^", "_", "!", *_CLOSE, *_SUM, *_PRODUCT, *_ENDS}
_SEPARATORS = {",", ";", "&", r"\\"}
_HUGE = 1e12  # sizes stop growing here, so that none becomes inf
_BINOMIAL = {r"\binom", r"\dbinom", r"\tbinom", r"\choose"}


def refusal(latex: str) -> str | None:
    r"""Why an answer is not given to the computer algebra.

    Args:
        latex: an answer without its `\boxed{}` or dollar signs.

    Returns:
        "length", "digits", "nesting", "items" or "size"; None where it is harmless.
    """
    if len(latex) > MAX_CHARS:
        return "length"
    if any(char.isdigit() and not char.isascii() for char in latex):  # int() reads them, the scanner below does not
        return "digits"
    tokens = _TOKEN.findall(latex)
    depth = deepest = 0
    for token in tokens:
        depth += (token in _OPEN) - (token in _CLOSE)
        deepest = max(deepest, depth)
        if depth < 0:
            return "nesting"
    if depth or deepest > MAX_DEPTH:
        return "nesting"
    if sum(token in _SEPARATORS for token in tokens) >= MAX_ITEMS:
        return "items"
    return "size" if digits(latex) > MAX_DIGITS else None


def digits(latex: str) -> float:
    """An upper bound of the decimal digits of any whole number in the evaluated expression; balanced brackets only."""
    return _Scanner(_TOKEN.findall(latex)).sequence()


class _Scanner:
    """Reads tokens from the left. Sizes are log10 of (value + 1): then products and sums both stay under the sum."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def sequence(self) -> float:
        """The size of everything up to a closing bracket: the largest term times the number of terms."""
        terms, base = [0.0], 0.0  # base: the size of what a power or factorial here would take
        while self.tokens:
            token = self.tokens.pop()
            if token in _CLOSE:
                break
            if token in _SUM:
                terms.append(0.0)
                base = 0.0
            elif token in _PRODUCT:
                base = 0.0
            elif token in _ENDS:
                base = sum(terms)
            elif token == "_":
                terms[-1] += self.item()
            else:
                size = min(self.applied(token, base), _HUGE)
                terms[-1] += size - base
                base = size
        return max(terms) + math.log10(len(terms))

    def applied(self, token: str, base: float) -> float:
        """The size of `base` with a power or factorial applied, or with one more factor."""
        if token == "^":
            exponent = self.exponent()
            return max(base * _ten_to(exponent), base + exponent)
        if token == "!":
            if self.peek() == "!":  # a double factorial is smaller
                self.tokens.pop()
            return max(base, 0.3) * _ten_to(base)
        self.tokens.append(token)
        return base + self.item()

    def exponent(self) -> float:
        """What stands behind "^", with powers of its own: towers are read from the right."""
        size = self.item()
        if self.peek() == "^":
            self.tokens.pop()
            return min(size * _ten_to(self.exponent()), _HUGE)
        return size

    def item(self) -> float:
        while self.peek() in ("+", "-"):
            self.tokens.pop()
        if not self.tokens or self.peek() in _CLOSE:
            return 0.0
        token = self.tokens.pop()
        if token in _OPEN:
            return self.sequence()
        if token[0] in "0123456789." and token != ".":
            whole, _, part = token.partition(".")
            return math.log10(max(int(whole + part), 10 ** len(part)) + 1)  # 0.125 becomes 125/1000
        return self.command(token) if token[0] == "\\" else 0.5  # a letter: e and pi are under 10^0.5

    def command(self, token: str) -> float:
        """A command with its arguments; without braces, the next item may be one."""
        if token in _EXPONENTIAL:
            return 0.5 * _ten_to(self.item() + 0.5)
        if token in _BINOMIAL:
            return 0.302 * _ten_to(self.item()) + self.item()  # under 2^n
        size = 0.5
        if self.peek() not in ("{", "["):
            return size if self.peek() in _NO_ARGUMENT else size + self.item()
        while self.peek() in ("{", "["):
            size += self.item()
        return size


def _ten_to(size: float) -> float:
    return 10.0 ** min(size, 12.0)
