"""`python -m slothrl reward`: try reward functions on the data, without a model."""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slothrl.errors import ConfigError, UserError

USAGE = """\
python -m slothrl reward [--config-dir FOLDER] [group=choice] [key=value] … [completions=FILE] [rows=16]

Calls each configured reward function, and the held-out score's, on completions made from the gold answers of the
configured data, and on empty, garbled and repetitive ones; twice. No model is loaded. Overrides are those of training.
  completions=FILE  score these instead: .jsonl rows with prompt, completion and the columns that the functions read
  rows=N            how many rows of the data to use, 16 by default
The exit code is 0 also where something looks wrong, and 2 where a function fails.
Example: python -m slothrl reward data=gsm8k 'reward.functions=[./my_reward.py:score]'
"""
ROWS = 16
PATIENCE = 30.0  # seconds after which the second pass stops: enough has been seen of a slow function


def main(argv: list[str]) -> int:
    """Try the functions and print what came out; returns the exit code."""
    from slothrl.train import fail

    try:
        if {"--help", "-h"} & set(argv):
            print(USAGE)
            return 0
        return _run(*_options(argv))
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        from slothrl.train import INTERRUPTED

        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _options(argv: list[str]) -> tuple[Any, str | None, int]:
    """The config, the file of completions, how many rows."""
    from slothrl.compose import compose_config
    from slothrl.train import _take_overlay

    overlay, rest = _take_overlay(argv)
    if flags := [argument for argument in rest if argument.startswith("-")]:
        raise ConfigError([f"{flag}: no such option of `slothrl reward`; see --help" for flag in flags])
    ours = dict(argument.split("=", 1) for argument in rest if argument.startswith(("completions=", "rows=")))
    overrides = [argument for argument in rest if not argument.startswith(("completions=", "rows="))]
    count = ours.get("rows", str(ROWS))
    if not count.isdecimal() or not 1 <= int(count) <= 10_000:
        raise ConfigError([f"rows={count}: must be a whole number from 1 to 10000"])
    return compose_config(overrides, overlay), ours.get("completions"), int(count)


def _run(config: Any, completions: str | None, count: int) -> int:
    from rich.console import Console

    from slothrl.reward_isolation import open_rewards, open_score
    from slothrl.reward_samples import samples_of_data, samples_of_file
    from slothrl.reward_workers import closing_workers

    if not config.reward.functions:
        raise ConfigError(["reward.functions is empty: name at least one, as in reward.functions=[./my_reward.py:fn]"])
    config.reward.max_failure_rate = 1.0  # here failures are what is looked for
    samples = samples_of_file(completions) if completions else samples_of_data(config.data, count)
    with closing_workers():
        rewards = open_rewards(config.reward)
        score = open_score(config.reward, rewards)
        extra = [score] if score is not None and score not in rewards else []
        texts = [*config.reward.functions, *([config.reward.score] if extra else [])]
        found = [_measure(reward, text, samples) for reward, text in zip([*rewards, *extra], texts, strict=True)]
    return show(Console(), found, samples, completions or config.data.source)


def _measure(reward: Any, text: str, samples: Sequence[Any]) -> Any:
    """Score every sample twice."""
    from slothrl.reward_findings import Measured

    measured = Measured(reward.name, _range_of(reward, text))
    prefix = f"rewards/{reward.name}/status/"

    def log_metric(name: str, value: float) -> None:
        if not name.startswith(prefix):
            measured.metrics[name] = float(value)
        elif (
            name != f"{prefix}ok" and value
        ):  # a worker's: what it says is None beside these is no choice of the function
            measured.statuses[name.removeprefix(prefix)] += int(value)

    state = SimpleNamespace(global_step=0, max_steps=1, epoch=0.0, num_train_epochs=1, log_history=[])
    given = {"trainer_state": state, "log_metric": log_metric, "log_extra": lambda *args, **kwargs: None}
    begin = time.monotonic()
    try:
        for scores in (measured.first, measured.second):
            for sample in samples:
                if measured.second and time.monotonic() - begin > PATIENCE:
                    break
                start = time.perf_counter()
                scores.append(_called(reward, {**sample.batch(), **given}))
                measured.seconds.append(time.perf_counter() - start)
    except UserError as error:
        measured.error = str(error)
    numbers = [score for scores in (*measured.first, *measured.second) for score in scores]
    failed = sum(measured.statuses.values())
    measured.statuses["ok"] = len(numbers) - numbers.count(None)
    measured.statuses["none"] = max(numbers.count(None) - failed, 0)
    return measured


def _called(reward: Any, batch: dict[str, Any]) -> list[float | None]:
    scores = reward(**batch)
    if inspect.isawaitable(scores):

        async def result() -> Any:
            return await scores

        with ThreadPoolExecutor(1) as pool:  # the caller may run a loop of its own
            return pool.submit(asyncio.run, result()).result()
    return scores


def _range_of(reward: Any, text: str) -> tuple[float, float] | None:
    """The function's attribute `reward_range`; of one in a worker, from a look at it here."""
    from slothrl.reward_sources import parse, resolve

    try:
        function = reward.function or resolve(parse(text))[0]
        low, high = function.reward_range
        return float(low), float(high)
    except (UserError, AttributeError, TypeError, ValueError):
        return None


def show(console: Any, found: list[Any], samples: Sequence[Any], where: str | Path) -> int:
    """Print scores, calls and remarks; returns 2 where a function failed, else 0."""
    from slothrl.reward_findings import remarks

    console.print(_score_table(found, samples, where))
    console.print(_call_table(found))
    for measured in found:
        for line in remarks(measured, list(samples)):
            console.print(f"warning: {measured.name}: {line}", style="yellow", markup=False, soft_wrap=True)
    failed = False
    for measured in found:
        bad = {status: n for status, n in measured.statuses.items() if n and status not in ("ok", "none", "nan")}
        if measured.error is not None:
            print(f"error: {measured.error}", file=sys.stderr)
        elif bad:
            told = ", ".join(f"{status} {n}" for status, n in bad.items())
            print(f"error: {measured.name} failed on some completions: {told}", file=sys.stderr)
        failed = failed or measured.error is not None or bool(bad)
    return 2 if failed else 0


def _score_table(found: list[Any], samples: Sequence[Any], where: str | Path) -> Any:
    from rich.markup import escape
    from rich.table import Table

    count = len(samples[0].rows) if samples[0].kind != "given" else sum(len(sample.rows) for sample in samples)
    table = Table(title=escape(f"scores on {count} rows of {where}"), title_justify="left")
    table.add_column("completion")
    for measured in found:
        table.add_column(escape(measured.name), justify="right")
    by_kind = [measured.by_kind(list(samples)) for measured in found]
    for kind in dict.fromkeys(sample.kind for sample in samples):
        table.add_row(kind, *(_cell(scores.get(kind, [])) for scores in by_kind))
    return table


def _cell(scores: list[float | None]) -> str:
    numbers = [score for score in scores if score is not None]
    if not numbers:
        return "none" if scores else "-"
    low, high, mean = min(numbers), max(numbers), sum(numbers) / len(numbers)
    return f"{mean:.2f}" if high - low < 1e-9 else f"{mean:.2f} ({low:.4g} to {high:.4g})"


def _call_table(found: list[Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from slothrl.reward_findings import percentile

    table = Table(title="calls", title_justify="left")
    for heading in ("function", "range", "p50", "p99", "completions", "logged"):
        table.add_column(heading, overflow="fold")
    for measured in found:
        span = f"{measured.range[0]:g} to {measured.range[1]:g}" if measured.range else "not said"
        times = [f"{1000 * percentile(measured.seconds, share):.1f} ms" for share in (0.5, 0.99)]
        statuses = ", ".join(f"{status} {n}" for status, n in measured.statuses.items() if n)
        logged = ", ".join(f"{name} {value:g}" for name, value in measured.metrics.items() if value)
        table.add_row(escape(measured.name), span, *times, escape(statuses or "none"), escape(logged))
    return table
