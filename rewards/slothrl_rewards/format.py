"""The completion has the form that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .ranges import ranged
from .text import Completion, completion_text


@ranged(0.0, 1.0)
def regex_format(
    prompts: list[Any], completions: list[Completion], pattern: str | None = None, full: bool = True, **kwargs: Any
) -> list[float | None]:
    """Match a regular expression; "." matches newlines too.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        pattern: Python's `re` syntax.
        full: the whole text must match (white space at both ends aside); else a match anywhere counts.

    Returns:
        1.0 or 0.0 each.

    Raises:
        ValueError: `pattern` is missing or not a regular expression.
    """
    if not pattern:
        raise ValueError("regex_format has no pattern: give one with '+reward.params.regex_format.pattern=...'")
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"reward.params.regex_format.pattern={pattern!r} is not a regular expression: {error}"
        ) from error
    match = compiled.fullmatch if full else compiled.search
    return [float(match(completion_text(completion).strip()) is not None) for completion in completions]


@ranged(0.0, 1.0)
def tag_format(
    prompts: list[Any], completions: list[Completion], tags: Sequence[str] = ("think", "answer"), **kwargs: Any
) -> list[float | None]:
    """Ask for `<think>...</think><answer>...</answer>`: every tag exactly once, in order, only white space around.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        tags: the names, in order.

    Returns:
        1.0 for the full form; otherwise 0.5 / len(tags) (0.25 with two tags) for every tag that is opened and closed
        exactly once, so at most 0.5.

    Raises:
        ValueError: `tags` is empty, a single string, or holds anything but strings.
    """
    # A dataset column called "tags" would arrive here too, as one value a completion.
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) for tag in tags):
        hint = "'+reward.params.tag_format.tags=[think,answer]'"
        raise ValueError(f"tag_format takes a list of tag names, not {tags!r}: {hint}")
    return [_tag_score(completion_text(completion), tags) for completion in completions]


def _tag_score(text: str, tags: Sequence[str]) -> float:
    spans = [_tag_span(text, tag) for tag in tags]
    whole = [span for span in spans if span is not None]
    partial = 0.5 * len(whole) / len(tags)
    if len(whole) < len(tags):
        return partial
    outside, end = "", 0
    for start, stop in whole:
        if start < end:  # nested or out of order
            return partial
        outside, end = outside + text[end:start], stop
    return partial if (outside + text[end:]).strip() else 1.0


def _tag_span(text: str, tag: str) -> tuple[int, int] | None:
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, stop = text.index(opening), text.index(closing)
    return (start, stop + len(closing)) if start < stop else None
