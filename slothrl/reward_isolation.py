"""Reward functions as a run uses them: each in worker processes of its own, several of them at work at once."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from slothrl.config import RewardConfig
from slothrl.errors import ConfigError, UserError
from slothrl.reward_batches import Batch, run_batches
from slothrl.reward_failures import Ledger
from slothrl.reward_sources import mentions, parse
from slothrl.reward_workers import WorkerPool, drive, encoded, load
from slothrl.rewards import Reward, load_reward, load_rewards, load_score, table_problems

HISTORY = 10  # entries of trainer_state.log_history that a worker sees
NEEDS_MAIN = "needs_main_process"  # the attribute of a function that must not run in a worker
_SCALARS = (str, int, float, type(None))


class IsolatedReward(Reward):
    """A `Reward` whose function runs in worker processes; called like any other, and never a coroutine function.

    Args:
        pool: its workers, loaded.
        config: what becomes of failures.
        weight, params: as in `Reward`.
        folder: the run's.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> IsolatedReward:
        return object.__new__(cls)

    def __init__(self, pool: WorkerPool, config: RewardConfig, weight: float, params: Any, folder: Path | None):
        said = pool.described
        self.name = self.__name__ = said["name"]
        self.source, self.weight, self.params = said["source"], weight, dict(params)
        self.named, self.required, self.takes_all = said["named"], said["required"], said["takes_all"]
        self.function, self.pool, self.config = None, pool, config
        self.ledger = Ledger(self.name, config, pool, folder)
        self.group: Together | None = None

    def __call__(self, prompts: list, completions: list, **kwargs: Any) -> list[float | None]:
        """Score completions; one that cannot be scored gets what `reward.on_failure` says.

        Raises:
            UserError: a column that JSON cannot hold, a missing one, or too many failures.
        """
        given = {"prompts": prompts, "completions": completions, **kwargs}
        batch = self.group.batch(self, given) if self.group else score_all([self], given)[0]
        if "log_metric" in kwargs and "log_extra" in kwargs:
            batch.replay(kwargs["log_metric"], kwargs["log_extra"])
            for status in ["ok", *(status for status in self.ledger.counts if status != "ok")]:
                kwargs["log_metric"](f"rewards/{self.name}/status/{status}", batch.statuses.count(status))
        instead = 0.0 if self.ledger.on_failure == "zero" else None
        bad = [status not in ("ok", "nan") for status in batch.statuses]
        return [instead if failed else score for failed, score in zip(bad, batch.scores, strict=True)]

    def begin(self, given: dict[str, Any]) -> Batch:
        """The work on a batch, not yet begun."""
        self.ledger.begin(len(given["completions"]))
        return Batch(self.pool, *self._plain(given), self.ledger.failed)

    def strict(self, **given: Any) -> list[float | None]:
        """Score completions in one call, for a trial: nothing is retried or counted.

        Raises:
            UserError: the call failed, or one completion's score did.
        """
        batch, worker = Batch(self.pool, *self._plain(given), lambda failure: None), self.pool.workers[0]
        worker.ask(encoded(batch.request(range(batch.count))))
        try:
            drive([worker])
        except BaseException:
            worker.close()
            raise
        result = worker.result or {}
        if result.get("message"):
            raise UserError(result["message"])
        return result["scores"]

    def _plain(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(columns, trainer state) that the function gets, as JSON holds them."""
        wanted = self.arguments(given) | {name: given[name] for name in ("prompts", "completions")}
        left_out = {*self.params, "trainer_state", "log_metric", "log_extra"}  # the worker has or makes those
        columns = {name: values for name, values in wanted.items() if name not in left_out}
        if odd := [name for name, values in columns.items() if not _is_plain(values)]:
            raise UserError(
                f"reward {self.name}: {', '.join(odd)}: values that cannot be sent to a worker as JSON; "
                "reward.isolate=false calls it in this process"
            )
        return columns, _plain_state(given.get("trainer_state"))


class Together:
    """Isolated functions of one trainer, which calls one after the other: the first call sets all of them to work."""

    def __init__(self) -> None:
        self.members: list[IsolatedReward] = []
        self._completions: list | None = None  # kept, so that no other list can be taken for it
        self._batches: dict[str, Batch] = {}

    def batch(self, reward: IsolatedReward, given: dict[str, Any]) -> Batch:
        """The finished work of `reward` on this batch."""
        if given["completions"] is not self._completions or reward.name not in self._batches:
            self._batches = {}
            done = score_all(self.members, given)
            self._completions = given["completions"]
            self._batches = {member.name: batch for member, batch in zip(self.members, done, strict=True)}
        return self._batches.pop(reward.name)


def together(rewards: Sequence[Reward]) -> list[Reward]:
    """The same functions for a trainer, the isolated ones among them working at the same time."""
    group, found = Together(), []
    for reward in rewards:
        if isinstance(reward, IsolatedReward):
            reward = copy.copy(reward)
            reward.group = group
            group.members.append(reward)
        found.append(reward)
    return found


def score_all(rewards: Sequence[IsolatedReward], given: dict[str, Any]) -> list[Batch]:
    """Let several functions score a batch at once."""
    batches = [reward.begin(given) for reward in rewards]
    run_batches(batches)
    for reward, batch in zip(rewards, batches, strict=True):
        reward.ledger.finished(batch)
    return batches


def open_rewards(config: RewardConfig, folder: Path | None = None, root: Path | None = None) -> list[Reward]:
    """The functions of a configuration, each in workers of its own unless `config.isolate` is false.

    A function with the attribute `needs_main_process = True` stays in this process.

    Args:
        folder: the run's, for `reward_failure.json`.
        root: folder that relative `./file.py` paths start from; default: the current one.

    Raises:
        ConfigError: all problems, one line each.
    """
    if not config.isolate:
        return load_rewards(config, root)
    weights = list(config.weights or []) + [1.0] * len(config.functions)
    named = list(zip(config.functions, weights, strict=False))
    return _open(named, table_problems(config), config, folder, root)


def open_score(
    config: RewardConfig, rewards: list[Reward], folder: Path | None = None, root: Path | None = None
) -> Reward | None:
    """`slothrl.rewards.load_score`, in workers as `open_rewards`.

    Raises:
        ConfigError: `config.score` names a function that cannot be loaded.
    """
    names = {*config.functions, *(reward.name for reward in rewards)}
    if not config.isolate or config.score is None or config.score in names:
        return load_score(config, rewards, root)
    return _open([(config.score, 1.0)], [], config, folder, root)[0]


def _open(
    named: list[tuple[str, float]], problems: list[str], config: RewardConfig, folder: Path | None, root: Path | None
) -> list[Reward]:
    found: list[Reward | WorkerPool] = []
    for text, weight in named:
        try:
            found.append(_in_process(text, weight, config, root) or _pool(text, config, root))
        except UserError as error:
            problems.append(str(error))
    pools = [pool for pool in found if isinstance(pool, WorkerPool)]
    problems += [problem for problem in load(pools) if problem]
    if problems:
        for pool in pools:
            pool.close()
        raise ConfigError(problems)
    rewards: list[Reward] = []
    for (text, weight), item in zip(named, found, strict=True):
        if isinstance(item, WorkerPool) and item.described["needs_main_process"]:  # said by a module it imports from
            item.close()
            item = _in_process(text, weight, config, root, known=True) or item
        if isinstance(item, WorkerPool):
            item = IsolatedReward(item, config, weight, _params(config, item.name), folder)
        rewards.append(item)
    return rewards


def _in_process(
    text: str, weight: float, config: RewardConfig, root: Path | None, known: bool = False
) -> Reward | None:
    """The function in this process, if it needs to be here; as a rule that shows without importing its module."""
    spec = parse(text, root)
    if not known and not mentions(spec, NEEDS_MAIN):  # torch hardly fits into a worker's memory_gb
        return None
    reward = load_reward(text, weight, config.params, root)
    if not getattr(reward.function, NEEDS_MAIN, False):
        return None
    reward.source += ", in the trainer's process"
    return reward


def _pool(text: str, config: RewardConfig, root: Path | None) -> WorkerPool:
    name, root = parse(text, root).function, root or Path.cwd()
    params = _params(config, name)
    if not _is_plain(params):
        raise UserError(f"reward.params.{name}: not plain values; reward.isolate=false calls it in this process")
    start = {
        "path": [os.path.abspath(folder) if not folder or os.path.exists(folder) else folder for folder in sys.path],
        "cwd": os.getcwd(),
        "function": text,
        "params": {name: params},
        "root": str(root.absolute()),
        "memory_gb": float(config.memory_gb),
    }
    return WorkerPool(start, name, int(config.workers), float(config.timeout))


def _params(config: RewardConfig, name: str) -> dict[str, Any]:
    params: Any = config.params
    params = OmegaConf.to_container(params, resolve=True) if OmegaConf.is_config(params) else params
    given = params.get(name)
    return dict(given) if hasattr(given, "keys") else {}


def _is_plain(value: Any) -> bool:
    """Whether JSON brings it back as it was (a tuple as a list)."""
    if isinstance(value, list | tuple):  # token ids come by the thousand: look at each kind of element once
        return all(issubclass(kind, _SCALARS) for kind in set(map(type, value))) or all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return isinstance(value, _SCALARS)


def _plain_state(state: Any) -> dict[str, Any] | None:
    """TRL's `trainer_state` without what a worker has no use for; of the log the latest entries."""
    if state is None:
        return None
    fields = {name: value for name, value in vars(state).items() if name != "log_history" and _is_plain(value)}
    history = list(getattr(state, "log_history", None) or [])[-HISTORY:]
    return {**fields, "log_history": [entry for entry in history if _is_plain(entry)]}
