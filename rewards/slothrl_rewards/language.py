"""Keep to one script: models trained on answers alone drift into mixtures of languages."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from .ranges import ranged
from .text import Completion, completion_text

# Scripts that belong to one language's writing; by the first word of the characters' Unicode names.
_TOGETHER = {
    "JAPANESE": {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH"},
    "KOREAN": {"HANGUL", "CJK"},
    "CHINESE": {"CJK", "BOPOMOFO"},
}
# Formulas use these in every language.
_NEUTRAL = {"MATHEMATICAL", "GREEK", "MICRO", "OHM", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "SUPERSCRIPT"}


@ranged(0.0, 1.0)
def language_consistency(
    prompts: list[Any], completions: list[Completion], script: str | None = None, **kwargs: Any
) -> list[float | None]:
    """The share of letters in the wanted script, after the language reward of DeepSeek-R1 (2025, section 2.3.2).

    A script is not a language: English in place of French goes unseen. Letters of formulas (Greek, mathematical
    alphabets) count nowhere, unless Greek is wanted.

    Args:
        prompts: strings or chat messages; without `script`, the script of most letters of each (of its last user
            message) is wanted. Kana in a prompt makes it Japanese.
        completions: strings or chat messages.
        script: the first word of the letters' Unicode names ("latin", "cyrillic", "cjk", "hangul", "arabic", "greek",
            "devanagari", ...), or "japanese", "korean", "chinese".

    Returns:
        In [0, 1] each; None where the completion, or without `script` the prompt, has no letters.

    Raises:
        ValueError: `script` names none.
    """
    if script is not None and not _known(str(script).upper()):
        raise ValueError(f"language_consistency knows no script {script!r}: latin, cyrillic, cjk, japanese, arabic, …")
    scores: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = str(script).upper() if script is not None else _script_of(_prompt_text(prompt))
        scores.append(None if wanted is None else _share(completion_text(completion), wanted))
    return scores


def letter_counts(text: str) -> Counter[str]:
    """How many letters of each script a text has, by the first word of their Unicode names."""
    return Counter(name for char in text if (name := _letter(char)))


@lru_cache(maxsize=16_384)
def _letter(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").partition(" ")[0] if char.isalpha() else ""


@lru_cache(maxsize=256)
def _known(script: str) -> bool:
    return script in _TOGETHER or any(_letter(chr(code)) == script for code in range(0x20000))


def _script_of(text: str) -> str | None:
    counts = letter_counts(text)
    if counts["HIRAGANA"] or counts["KATAKANA"]:
        return "JAPANESE"
    letters = Counter({name: count for name, count in counts.items() if name not in _NEUTRAL}) or counts
    if not letters:
        return None
    most = letters.most_common(1)[0][0]
    return "KOREAN" if most == "HANGUL" else most


def _share(text: str, wanted: str) -> float | None:
    names = _TOGETHER.get(wanted, {wanted})
    counts = {name: count for name, count in letter_counts(text).items() if name in names or name not in _NEUTRAL}
    total = sum(counts.values())
    return sum(counts.get(name, 0) for name in names) / total if total else None


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    # The last user message: a system prompt is often in English whatever the user writes.
    users = [message for message in prompt or [] if message.get("role") == "user"]
    return completion_text([{**users[-1], "role": "assistant"}]) if users else ""
