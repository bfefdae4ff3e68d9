"""Reward functions with TRL's signature, standard library only: see rewards/README.md for the contract."""

from .arithmetic import arithmetic
from .countdown import countdown
from .exact import exact_match
from .format import regex_format, tag_format
from .gsm8k import gsm8k, gsm8k_answer
from .length import length_penalty
from .number import last_number, number_match
from .text import completion_text

__all__ = [
    "arithmetic",
    "completion_text",
    "countdown",
    "exact_match",
    "gsm8k",
    "gsm8k_answer",
    "last_number",
    "length_penalty",
    "number_match",
    "regex_format",
    "tag_format",
]
