r"""Mathematical answers compared as mathematics, through math-verify (optional): 1/2 is 0.5 is \frac{1}{2}."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .math_limits import refusal
from .number import NUMBER, bare_number, same_number
from .ranges import ranged
from .text import Completion, answer_text, completion_text, inside_tag

MAX_TEXT = 50_000  # characters at the end of a completion that are searched for its answer
MAX_SPANS = 5_000  # characters at the end that are searched for formulas: each "\\(" looks 500 ahead for its end

_BOXES = ("\\boxed{", "\\fbox{")
_MARKED = re.compile(r"####[ \t]*(\S.*)")
_SAID = re.compile(r"\banswer(?: is|:)[ \t*:]*(\S.*)", re.IGNORECASE)
_SPAN = re.compile(r"\$\$([^$]{1,500})\$\$|\$([^$\n]{1,500})\$|\\\(([^\n]{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL)
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")  # of prose: neither a command nor an environment's name
_QUANTITY = re.compile(rf"{NUMBER}(?:[ ]*/[ ]*{NUMBER})?%?", re.ASCII)
_NOISE = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[!,;: ]|\s|(?<=\d)\{,\}|(?<=\d),(?=\d{3}(?!\d))"
)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")


@ranged(0.0, 1.0)
def math_answer(
    prompts: list[Any],
    completions: list[Completion],
    answer: list[Any],
    timeout: int = 5,
    log_metric: Callable[[str, float], Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Compare the completion's final answer with the right one: numbers, expressions, sets, intervals, equations.

    The final answer is the first of these that is there: the last `\boxed{}`, the last "####" line, the last
    `<answer>` tag, what follows the last "answer is", the last formula in dollar signs, a last line without words, the
    last number.

    Answers that could blow up (see `math_limits`) are not evaluated and count as wrong, and so do those that take too
    long. `log_metric` gets how many: "math_answer/refused" and "math_answer/timeouts". The time limit is an alarm,
    which only a main thread can set; in another thread there is none.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        answer: one a completion: LaTeX or plain, or a whole solution that holds its answer in one of those forms.
        timeout: whole seconds for reading an answer, and once more for comparing.
        log_metric: given by the trainer.

    Returns:
        1.0 or 0.0 each; None where `answer` is None or cannot be read.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: `answer` and `completions` differ in length, or `timeout` is no positive whole number.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 1:
        raise ValueError(f"math_answer needs timeout as whole seconds from 1, not {timeout!r}")
    _math_verify()
    limit = timeout if threading.current_thread() is threading.main_thread() else None
    counts = {"refused": 0, "timeouts": 0}
    slow: set[str] = set()
    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        wanted = None if expected is None else final_answer(answer_text(expected))
        found = final_answer(completion_text(completion))
        scores.append(None if wanted is None else _score(found, wanted, limit, counts, slow))
    if log_metric is not None:
        for name, count in counts.items():
            log_metric(f"math_answer/{name}", float(count))
    return scores


def setup() -> None:
    """Import math-verify and use it once, a second or two, before the first time limit; called by slothrl."""
    _math_verify()
    if threading.current_thread() is threading.main_thread():
        _equal(_parsed("x^2+2x+1", 60), "(x+1)^2", 60)


def final_answer(text: str) -> str | None:
    r"""The final answer of a solution, without `\boxed{}`, dollar signs and full stops; None where there is none."""
    text = text[-MAX_TEXT:]
    if (boxed := _boxed(text)) is not None:
        return _bare(boxed) or None
    for found in (_last(_MARKED, text), inside_tag(text, "answer"), _last(_SAID, text)):
        if found is not None and (narrowed := _narrow(found)):
            return narrowed
    text = text[-MAX_SPANS:]
    if spans := _SPAN.findall(text):
        return _bare("".join(spans[-1])) or None
    return _narrow(text.strip().rpartition("\n")[2]) or _narrow(text)


def _boxed(text: str) -> str | None:
    start = max(text.rfind(box) + len(box) if box in text else -1 for box in _BOXES)
    depth = 1
    for position, char in enumerate(text[start:] if start >= 0 else ""):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start : start + position]
    return None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


def _narrow(text: str) -> str | None:
    """The answer in a line: its last formula, the line itself where it has no words, else its last number."""
    text = text[-MAX_SPANS:]
    if spans := _SPAN.findall(text):
        return _bare("".join(spans[-1])) or None
    bare = _bare(text)
    if bare and "\n" not in bare and not _WORD.search(bare):
        return bare
    if bare and re.fullmatch(r"\w+", bare):  # one word: "Tuesday"
        return bare
    quantities = _QUANTITY.findall(text)
    return _bare(quantities[-1]) if quantities else None


def _bare(text: str) -> str:
    text = text.replace("\N{MINUS SIGN}", "-").replace("**", "^").strip()
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match.group().translate(_SUPERSCRIPTS)}}}", text)
    return text.strip("$^ \t\r\n").rstrip("$^. \t\r\n")


def _score(found: str | None, wanted: str, limit: int | None, counts: dict[str, int], slow: set[str]) -> float | None:
    if found is not None and _plain(found) == _plain(wanted):
        return 1.0
    wanted_number, number = bare_number(_plain(wanted)), bare_number(_plain(found or ""))
    if wanted_number is not None and number is not None:
        return float(same_number(number, wanted_number))
    try:
        gold = None if wanted in slow or refusal(wanted) else _gold(wanted, limit)
    except _math_verify().errors.TimeoutException:
        slow.add(wanted)  # not tried again for the rest of its group, but in the next call: the machine may be busy
        counts["timeouts"] += 1
        return None
    if gold is None:
        return None
    if not found or (refused := refusal(found)):
        counts["refused"] += bool(found and refused)
        return 0.0
    try:
        return float(_equal(gold, found, limit))
    except _math_verify().errors.TimeoutException:
        counts["timeouts"] += 1
    except Exception:  # whatever the parser and the algebra raise for strange input
        pass
    return 0.0


def _plain(answer: str) -> str:
    r"""Spelling aside: white space, \left, \text, \dfrac, thousands commas."""
    return _TEXT.sub(r"\1", _NOISE.sub("", answer)).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


@lru_cache(maxsize=4096)
def _gold(wanted: str, limit: int | None) -> Any:
    """The right answer, read once for all the completions of its group; None where it cannot be read."""
    try:
        return _parsed(wanted, limit)
    except _math_verify().errors.TimeoutException:
        raise  # which the cache does not keep
    except Exception:
        return None


def _parsed(answer: str, limit: int | None) -> Any:
    package = _math_verify()
    target = package.LatexExtractionConfig(boxed_match_priority=-1)
    answer = answer.replace("$", "")
    value = re.sub(r"\\?%$", "", answer)
    latex = f"${value}$%" if value != answer else f"${answer}$"  # math-verify reads a percent sign behind the formula
    found = package.parse(latex, [target], fallback_mode="no_fallback", parsing_timeout=limit, raise_on_error=True)
    return found[0] if found else None


def _equal(gold: Any, found: str, limit: int | None) -> bool:
    parsed = _parsed(found, limit)
    if parsed is None:
        return False
    return _math_verify().verify(gold, parsed, timeout_seconds=limit, raise_on_error=True)


def _math_verify() -> Any:
    try:
        import math_verify
        import math_verify.errors
    except ImportError as error:
        raise ImportError("math_answer needs one more package: pip install 'slothrl[math]' (math-verify)") from error
    return math_verify
