r"""Grade-school maths (Cobbe et al., 2021): "#### 42", \boxed{42}, <answer>42</answer>, or the last number."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from .number import NUMBER, as_number, last_number, same_number
from .ranges import ranged
from .text import Completion, answer_text, completion_text, inside_tag

# Alone on its line: "#### Step 2" is a Markdown heading, not an answer.
_MARKED = re.compile(rf"####[ \t]*({NUMBER})[ \t.]*$", re.ASCII | re.MULTILINE)
_BOXED = "\\boxed{"
_BOXED_CHARS = 200


@ranged(0.0, 1.0)
def gsm8k(prompts: list[Any], completions: list[Completion], answer: list[Any], **kwargs: Any) -> list[float | None]:
    r"""Compare the completion's final answer with the right one, as numbers.

    The final answer is the first of these that holds a number: the last "#### 42" line, the last `\boxed{42}`, the
    last `<answer>` tag, the last number of the text.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        answer: one a completion; the final number or a whole solution that ends in "#### 42".

    Returns:
        1.0 or 0.0 each; None where `answer` is None or holds no number.

    Raises:
        ValueError: `answer` and `completions` differ in length.
    """
    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        wanted = None if expected is None else as_number(gsm8k_answer(answer_text(expected)))
        found = _final_number(completion_text(completion))
        scores.append(None if wanted is None else float(same_number(found, wanted)))
    return scores


def gsm8k_answer(solution: str) -> str:
    """The final answer of a GSM8K solution.

    Args:
        solution: "... #### 1,234", or just the answer.

    Returns:
        What follows the last "####", without thousands commas: "1234".
    """
    return solution.rpartition("####")[2].strip().replace(",", "")


def _final_number(text: str) -> Decimal | None:
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",").replace("\\,", "")  # LaTeX's thousands separators
    marked = _MARKED.findall(text)
    for part in (marked[-1] if marked else None, _boxed(text), inside_tag(text, "answer")):
        number = None if part is None else last_number(part)
        if number is not None:
            return number
    return last_number(text)


def _boxed(text: str) -> str | None:
    _, found, rest = text.rpartition(_BOXED)
    depth = 1
    for position, char in enumerate(rest[:_BOXED_CHARS] if found else ""):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[:position]
    return None
