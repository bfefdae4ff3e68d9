"""Completions of held-out prompts, which training never sees, scored by one reward function."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from slothrl.engine import Engine, Sampling
from slothrl.rewards import Reward


@dataclass(frozen=True)
class HeldOut:
    """Mean score over the prompts to which the function applies.

    Attributes:
        score: mean of the function's values; NaN where it applied to none.
        count: prompts it applied to.
        completions: the text of each completion, in the order of the prompts.
        scores: the function's value for each, None where it did not apply.
    """

    score: float
    count: int
    completions: list[str]
    scores: list[float | None]


def prompt_token_ids(tokenizer, prompts: Sequence[Any], template: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Token ids of prompts that are strings or chat messages, ready for an engine.

    Args:
        template: keywords for the chat template, as TRL's `chat_template_kwargs`.
    """
    if prompts and isinstance(prompts[0], list):
        options = {**(template or {}), "add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [tokenizer.apply_chat_template(messages, **options) for messages in prompts]
    return [tokenizer(text)["input_ids"] for text in prompts]


def held_out(
    engine: Engine,
    tokenizer,
    rows: list[dict[str, Any]],
    score: Reward,
    sampling: Sampling,
    template: Mapping[str, Any] | None = None,
    watch: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> HeldOut:
    """Complete every row once and score it.

    Args:
        rows: each with `prompt` and the columns that the function reads.
        sampling: how; `temperature=0` is greedy, and the score then pass@1 where it is 0 or 1.
        template: keywords for the chat template.
        watch: makes what is around the engine's call, such as a deadline.
    """
    prompts = [row["prompt"] for row in rows]
    prompt_ids = prompt_token_ids(tokenizer, prompts, template)
    with watch():
        rollout = engine.generate(prompt_ids, sampling)
    texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    chat = isinstance(prompts[0], list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    values = score(
        prompts=prompts,
        completions=completions,
        completion_ids=rollout.completion_ids,
        trainer_state=None,
        log_metric=lambda name, value: None,
        log_extra=lambda column, values: None,
        **columns,
    )
    if inspect.isawaitable(values):
        values = asyncio.run(_result(values))
    counted = [value for value in values if value is not None]
    return HeldOut(sum(counted) / len(counted) if counted else float("nan"), len(counted), texts, list(values))


async def _result(awaitable):
    return await awaitable
