"""The held-out score of a policy as it is now: for `held_out.jsonl`, and for `python -m slothrl eval`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from slothrl.checks import set_fields
from slothrl.engine import Engine, Sampling
from slothrl.evaluate import HeldOut, held_out
from slothrl.prepare import Prepared
from slothrl.report import last_text
from slothrl.watchdog import deadline


def metric_name(prepared: Prepared) -> str | None:
    """What the held-out score measures: a reward function's name, "eval_loss", or None where nothing is held out."""
    if prepared.score is not None:
        return prepared.score.name
    return "eval_loss" if prepared.eval_loss is not None else None


Watch = Callable[[], AbstractContextManager[Any]]


def watched(prepared: Prepared, folder: Path, advice: str) -> Watch:
    """A deadline of `rollout.timeout` around each of the engine's calls (`slothrl.watchdog.deadline`).

    Args:
        folder: where every thread's stack goes.
        advice: the message's end.
    """
    seconds = prepared.config.rollout.timeout
    return lambda: deadline(seconds, "a rollout for the held-out score", folder, advice)


def score_policy(prepared: Prepared, trainer: Any, engine: Engine, watch: Watch = nullcontext) -> list[dict[str, Any]]:
    """Measure the policy on the held-out rows.

    Args:
        watch: makes what is around each of the engine's calls.

    Returns:
        A record a measurement, each with its `step`: the loss (nats a token) where there are rows for one, then the
        greedy completions with their scores, then the sampled ones where `reward.score_samples` asks for some.
    """
    step, records = trainer.state.global_step, []
    if prepared.eval_loss is not None:
        records.append({"step": step, "eval_loss": trainer.evaluate()["eval_loss"]})
    if prepared.score is None:
        return records
    engine.push_lora()
    # SFTConfig has no such field, but the data presets name it for every algorithm.
    limit = set_fields(prepared.config.trainer).get("max_completion_length", 256)
    greedy = _complete(prepared, engine, Sampling(max_tokens=limit, temperature=0.0), watch)
    records.append(
        {
            "step": step,
            "metric": prepared.score.name,
            "score": greedy.score,
            "count": greedy.count,
            "completions": greedy.completions,
            "scores": greedy.scores,
            "prompts": [last_text(row["prompt"]) for row in prepared.eval_rows],
        }
    )
    if samples := prepared.config.reward.score_samples:
        records.append({"step": step, **_sampled(prepared, engine, limit, samples, watch)})
    return records


def _sampled(prepared: Prepared, engine: Engine, limit: int, samples: int, watch: Watch) -> dict[str, Any]:
    """Scores of sampled completions, `samples` a prompt, at training's temperature."""
    assert prepared.score is not None
    temperature = float(set_fields(prepared.config.trainer).get("temperature", 1.0))
    with torch.random.fork_rng():  # training draws the same with and without this
        torch.manual_seed(prepared.config.seed)
        sampling = Sampling(max_tokens=limit, temperature=temperature)
        found = [_complete(prepared, engine, sampling, watch).scores for _ in range(samples)]
    return {
        "sampled_metric": prepared.score.name,
        "temperature": temperature,
        "samples": samples,
        "sampled_scores": [list(scores) for scores in zip(*found, strict=True)],
    }


def _complete(prepared: Prepared, engine: Engine, sampling: Sampling, watch: Watch) -> HeldOut:
    assert prepared.score is not None
    rows, template = prepared.eval_rows, prepared.chat_template_kwargs
    return held_out(engine, prepared.tokenizer, rows, prepared.score, sampling, template, watch)


def headline(records: list[dict[str, Any]]) -> float | None:
    """The one number of a measurement: the mean score, or the loss where there is no score."""
    for name in ("score", "eval_loss"):
        for record in records:
            if name in record:
                return record[name]
    return None
