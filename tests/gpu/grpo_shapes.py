"""The GRPO steps that arms are compared at, and what they are forced to complete; imports no trainer."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """Attributes: tokens and counts of one step; `rows`: of a padded micro-batch; `short_warm_up`: the first step has
    one completion of full length, and the others 16 tokens."""

    prompts: int
    completions: int
    prompt: int
    completion: int
    rows: int
    steps: int
    short_warm_up: bool = False


SHAPES = {
    "main": Shape(8, 8, 504, 1024, 4, 2),
    "long-prompt": Shape(1, 8, 2048, 512, 4, 3),
    "long-completion": Shape(1, 8, 504, 20480, 1, 1, short_warm_up=True),
}
SHORT = 16


def shrunk(shape: Shape) -> Shape:
    return dataclasses.replace(shape, prompt=shape.prompt // 16, completion=shape.completion // 64)


def prompts_of(shape: Shape) -> list[str]:
    """Eight steps' prompts, no two alike, one token a character for `tiny_tokenizer`."""
    return [(chr(65 + i % 26) + chr(97 + i // 26)) * (shape.prompt // 2) for i in range(8 * shape.prompts)]


def forced(shape: Shape, call: int, vocabulary: int) -> tuple[list[list[int]], list[list[float]]]:
    """Completions of the call-th step (from 1), the same in every arm, and log-probs as if sampled uniformly."""
    draw, rows = random.Random(call), shape.prompts * shape.completions
    short = shape.short_warm_up and call == 1
    lengths = [SHORT if short and row else shape.completion for row in range(rows)]
    tokens = [draw.choices(range(4, vocabulary), k=length) for length in lengths]
    return tokens, [[-math.log(vocabulary)] * length for length in lengths]


def reward(completions: Any, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids[:SHORT]) % 97) for ids in completion_ids]
