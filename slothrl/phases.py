"""What a trainer is doing at the moment: for messages about what went wrong, and for deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

START, ROLLOUT, REWARDS, LOGPROBS = "start", "rollout", "rewards", "log-probs"
FORWARD, BACKWARD, OPTIMIZER, CHECKPOINT = "forward", "backward", "optimizer", "checkpoint"


class Phases:
    """The current phase, by name. After an exception it stays the one that raised."""

    def __init__(self) -> None:
        self.current = START

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Be in phase `name` inside, and in the one before after it. An exception leaves `name` standing."""
        before, self.current = self.current, name
        yield
        self.current = before
