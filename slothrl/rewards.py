"""Reward functions by name: found, wrapped and tried out before any model is loaded. Imports no torch and no TRL."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from slothrl.errors import ConfigError, UserError
from slothrl.reward_sources import check_static, described, nearest, parse, place, resolve, set_up, told

if TYPE_CHECKING:  # a reward worker starts faster without OmegaConf
    from slothrl.config import RewardConfig

_FLOAT32_MAX = 3.4028234e38  # TRL keeps rewards in float32; a larger one would become inf there


class Reward:
    """One reward function with its parameters; callable by TRL, which logs it under `__name__`.

    An `async def` function gives an `AsyncReward`. A function without `**kwargs` gets only the columns it names.

    Args:
        function: TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`.
        name: what logs and messages call it; default: the function's own name.
        source: where it came from, for the report.
        weight: its factor in the sum of rewards; applied by the trainer, not here.
        params: keywords given at every call; they win over dataset columns.

    Raises:
        UserError: `function` is no function, or has no parameter of a name in `params`.
    """

    def __new__(cls, function: Any = None, *args: Any, **kwargs: Any) -> Reward:
        return object.__new__(AsyncReward if _is_async(function) else cls)

    def __init__(self, function: Any, name: str | None = None, source: str = "", weight: float = 1.0, params: Any = ()):
        self.name = self.__name__ = name or getattr(function, "__name__", type(function).__name__)
        self.function, self.source, self.weight, self.params = function, source, weight, dict(params)
        if not callable(function) or inspect.isclass(function):
            raise UserError(f"reward {self.name} is {described(function)}, not a function")
        self.named, self.required, self.takes_all = _parameters(function)
        for param in self.params:
            if param not in self.named and not self.takes_all:
                raise UserError(f"reward.params.{self.name}.{param}: no such parameter{nearest(param, self.named)}")

    def __call__(self, prompts: list, completions: list, **kwargs: Any) -> Any:
        """Score completions.

        Returns:
            One float or None (not applicable; NaN counts as None) a completion; an `AsyncReward`: a coroutine of it.

        Raises:
            UserError: the function lacks a column, raised, or returned something else than that many finite numbers.
        """
        arguments = self.arguments({"prompts": prompts, "completions": completions, **kwargs})
        try:
            scores = self.function(**arguments)
        except Exception as error:
            raise self.raised(error) from error
        return self._checked(scores, len(completions))

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        given = given | self.params
        if missing := [name for name in self.required if name not in given]:
            there = ", ".join(sorted(given))
            hint = f"neither a dataset column nor in reward.params.{self.name}; there are {there}"
            raise UserError(f"reward {self.name} needs {', '.join(missing)}: {hint}")
        return given if self.takes_all else {name: value for name, value in given.items() if name in self.named}

    def raised(self, error: BaseException) -> UserError:
        code = code_of(self.function)
        where = place(error, code.co_filename if code else None)
        if code and not where:  # it failed before its first line: wrong arguments
            where = f"{Path(code.co_filename).name}, line {code.co_firstlineno}"
        return UserError(f"reward {self.name} raised {told(error)} ({where or 'no source'})")

    def listed(self, scores: Any, count: int) -> list | tuple:
        """What the function returned, as `count` scores not yet looked at; anything else is a `UserError`."""
        if hasattr(scores, "tolist"):  # numpy arrays, torch tensors
            scores = scores.tolist()
        if not isinstance(scores, list | tuple):
            raise UserError(f"reward {self.name} returned {described(scores)} where a list of scores is expected")
        if len(scores) != count:
            raise UserError(f"reward {self.name} returned {len(scores)} scores for {count} completions")
        return scores

    def _checked(self, scores: Any, count: int) -> list[float | None]:
        scores = self.listed(scores, count)
        try:
            return [number(score, position) for position, score in enumerate(scores, start=1)]
        except UserError as error:
            raise UserError(f"reward {self.name} returned {error}") from error


class AsyncReward(Reward):
    """A `Reward` around an `async def` function: TRL awaits it on its own loop, all of them at once."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if sys.version_info >= (3, 12):  # before, inspect sees it on __call__ only; TRL looks there too
            inspect.markcoroutinefunction(self)

    async def __call__(self, prompts: list, completions: list, **kwargs: Any) -> list[float | None]:
        arguments = self.arguments({"prompts": prompts, "completions": completions, **kwargs})
        try:
            scores = await self.function(**arguments)
        except Exception as error:
            raise self.raised(error) from error
        return self._checked(scores, len(completions))


def load_rewards(config: RewardConfig, root: Path | None = None) -> list[Reward]:
    """Find, import and wrap the functions of a reward configuration.

    Args:
        config: `functions` names them.
        root: folder that relative `./file.py` paths start from; default: the current one.

    Returns:
        One `Reward` a name, in order; empty without names.

    Raises:
        ConfigError: all problems, one line each.
    """
    problems, rewards = table_problems(config), []
    weights = list(config.weights or []) + [1.0] * len(config.functions)  # a wrong count is among the problems
    for text, weight in zip(config.functions, weights, strict=False):
        try:
            rewards.append(load_reward(text, weight, config.params, root))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return rewards


def load_score(config: RewardConfig, rewards: list[Reward], root: Path | None = None) -> Reward | None:
    """The function of the held-out score: `config.score`, or the first of `rewards`; None where there is neither.

    Raises:
        ConfigError: `config.score` names a function that cannot be loaded.
    """
    if config.score is None:
        return rewards[0] if rewards else None
    for text, reward in zip(config.functions, rewards, strict=True):
        if config.score in (text, reward.name):
            return reward
    try:
        return load_reward(config.score, 1.0, config.params, root)
    except UserError as error:
        raise ConfigError([str(error)]) from error


def static_reward_problems(config: RewardConfig, root: Path | None = None) -> list[str]:
    """What is wrong with a reward configuration as far as it shows without importing anybody's code.

    Args:
        config: the configuration; `score` is checked too.
        root: folder that relative `./file.py` paths start from; default: the current one.

    Returns:
        One line a problem; empty if there is none.
    """
    problems = table_problems(config)
    known = {*config.functions, *map(_key, config.functions)}
    for text in [*config.functions, *({config.score} - {None} - known)]:
        try:
            check_static(parse(text, root))
        except UserError as error:
            problems.append(str(error))
    return problems


def self_test(rewards: list[Reward], rows: list[dict[str, Any]]) -> None:
    """Call every reward on the answers and on empty completions of up to four dataset rows.

    Args:
        rewards: what `load_rewards` returned.
        rows: dataset rows with "prompt" (a string or messages) and the other columns; none: nothing is tested.

    Raises:
        ConfigError: all problems, one line each.
    """
    problems = []
    for reward in rewards if rows else []:
        try:
            scores = getattr(reward, "strict", reward)(**_test_batch(rows[:4]))
            if inspect.iscoroutine(scores):
                import asyncio
                from concurrent.futures import ThreadPoolExecutor

                with ThreadPoolExecutor(1) as pool:  # a notebook's own thread has a running loop already
                    pool.submit(asyncio.run, scores).result()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)


def _test_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [row for row in rows for _ in range(2)]
    texts = ["" if index % 2 else str(row.get("answer") or "") for index, row in enumerate(rows)]
    columns: dict[str, Any] = {key: [row.get(key) for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt", [""] * len(rows))
    chat = [isinstance(prompt, list) for prompt in prompts]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    columns |= {
        "prompts": prompts,
        "completions": [m if is_chat else text for m, text, is_chat in zip(messages, texts, chat, strict=True)],
        "completion_ids": [list(range(len(text.split()) + 1)) for text in texts],
        # TRL never gives None here, and a function may read trainer_state.global_step.
        "trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0, num_train_epochs=1, log_history=[]),
        "log_metric": lambda *args, **kwargs: None,
        "log_extra": lambda *args, **kwargs: None,
    }
    return columns


def load_reward(text: str, weight: float, params: Any, root: Path | None) -> Reward:
    """Import and wrap one function; `params` maps functions' names to keywords. Raises: UserError."""
    spec = parse(text, root)
    function, source = resolve(spec)
    set_up(spec, function)
    given = params.get(spec.function) or {}
    return Reward(function, spec.function, source, weight, given if hasattr(given, "keys") else {})


def table_problems(config: RewardConfig) -> list[str]:
    """What is wrong between the fields of one configuration."""
    problems, keys = [], [_key(text) for text in config.functions]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        problems.append(f"reward.functions has more than one {key!r}; logs and reward.params need different names")
    if config.weights is not None and len(config.weights) != len(keys):
        problems.append(f"reward.weights has {len(config.weights)} numbers for {len(keys)} reward.functions")
    keys += [_key(config.score)] if config.score else []
    for name, given in config.params.items():
        if name not in keys:
            there = f"selected: {', '.join(keys) or 'none'}"
            problems.append(f"reward.params.{name}: {name!r} is not selected{nearest(str(name), keys)} ({there})")
        elif given is not None and not hasattr(given, "keys"):
            problems.append(f"reward.params.{name} is {described(given)}: write reward.params.{name}.<keyword>=<value>")
    return problems


def _key(text: str) -> str:
    """A function's name in logs and in `reward.params`: what follows the colon, or an entry point's name."""
    return str(text).rpartition(":")[2].strip()


def number(score: Any, position: int) -> float | None:
    """One score as a float, None for None and NaN; anything else is a `UserError` that says which completion's."""
    if score is None:
        return None
    try:
        value = None if isinstance(score, str | bytes) else float(score)
    except OverflowError:  # an enormous int
        value = math.inf
    except Exception:  # whatever a foreign type's __float__ raises
        value = None
    if value is None:
        raise UserError(f"{described(score)} where a number or None is expected (completion {position})")
    if abs(value) > _FLOAT32_MAX:
        raise UserError(f"{value} where a finite number is expected (completion {position})")
    return None if math.isnan(value) else value


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _is_async(function: Any) -> bool:
    function = _innermost(function)
    is_async = inspect.iscoroutinefunction
    return callable(function) and (is_async(function) or is_async(type(function).__call__))


def code_of(function: Any) -> CodeType | None:
    """The code object of a function that is written in Python."""
    function = inspect.unwrap(_innermost(function))
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)


def _parameters(function: Any) -> tuple[list[str], list[str], bool]:
    """Names of all parameters, of those without a default, and whether there is `**kwargs`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C without a signature
        return [], [], True
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [p.name for p in named], [p.name for p in named if p.default is p.empty], takes_all
