"""From what TRL hands over to plain text."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

# A completion is a string, or a list of chat messages [{"role": ..., "content": ...}].
Completion = str | list[dict[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text to be judged.

    Args:
        completion: a string, or chat messages; of messages the last assistant's content counts.

    Returns:
        The text; "" where no assistant message has any (a bare tool call).

    Raises:
        TypeError: `completion` is neither a string nor a list of messages.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list):
        raise TypeError(f"a completion is a string or a list of chat messages, not {type(completion).__name__}")
    for message in reversed(completion):
        if message.get("role") == "assistant":
            return _content_text(message.get("content"))
    return ""


def answer_text(answer: Any) -> str:
    """`str(answer)`, also for integers past Python's limit on int-to-string conversion."""
    try:
        return str(answer)
    except ValueError:
        return format(Decimal(answer), "f")


def inside_tag(text: str, tag: str) -> str | None:
    """What the last `<tag>` holds, up to `</tag>` or the end of a cut-off text; None without the tag."""
    _, found, rest = text.rpartition(f"<{tag}>")
    return rest.partition(f"</{tag}>")[0] if found else None


def _content_text(content: Any) -> str:
    if isinstance(content, list):  # multimodal parts: only the text ones are read
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""
