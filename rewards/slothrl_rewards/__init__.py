"""Reward functions with TRL's signature, standard library only: see rewards/README.md for the contract."""

from .arithmetic import arithmetic
from .countdown import countdown
from .exact import exact_match
from .format import regex_format, tag_format
from .gsm8k import gsm8k, gsm8k_answer
from .json_format import json_schema, xml_format
from .judge import llm_judge
from .language import language_consistency
from .length import length_penalty
from .math_answers import math_answer
from .number import last_number, number_match
from .ranges import ranged
from .repetition import repetition_penalty
from .text import completion_text

__all__ = [
    "arithmetic",
    "completion_text",
    "countdown",
    "exact_match",
    "gsm8k",
    "gsm8k_answer",
    "json_schema",
    "language_consistency",
    "last_number",
    "length_penalty",
    "llm_judge",
    "math_answer",
    "number_match",
    "ranged",
    "regex_format",
    "repetition_penalty",
    "tag_format",
    "xml_format",
]
