"""What a trainer is doing at the moment, and for how long: for messages, deadlines and reports."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

START, ROLLOUT, REWARDS, LOGPROBS = "start", "rollout", "rewards", "log-probs"
FORWARD, BACKWARD, OPTIMIZER, CHECKPOINT = "forward", "backward", "optimizer", "checkpoint"
PUSH, CACHE = "LoRA push", "KV cache"  # of a rollout: the probe counts as pushing; the cache is taken back and given up
ENGINE = (ROLLOUT, PUSH, CACHE)


class Phases:
    """The current phase, by name. After an exception it stays the one that raised."""

    def __init__(self) -> None:
        self._current = START
        self._since = time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def current(self) -> str:
        return self._current

    @current.setter
    def current(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[self._current] += now - self._since
        self._current, self._since = name, now

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Be in phase `name` inside, and in the one before after it. An exception leaves `name` standing."""
        before, self.current = self.current, name
        yield
        self.current = before

    def take_seconds(self) -> dict[str, float]:
        """Seconds in each phase since the last call, by the host's clock.

        A GPU works on behind the host: what one phase has queued may be paid for in the next one that waits.
        """
        self.current = self._current  # counts the running phase up to now
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
