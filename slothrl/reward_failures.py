"""What becomes of completions that a reward function could not score: counted, told once, written down."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter, deque
from pathlib import Path

from slothrl.config import RewardConfig
from slothrl.errors import UserError
from slothrl.reward_batches import Batch, Failure
from slothrl.reward_workers import WorkerPool

WINDOW = 10  # batches over which the failure rate is taken
FEW = 8  # failures that end no run before the window is full: 2 of the first 8 are no rate yet
SHOWN = 20  # different failures whose traceback is shown


class Ledger:
    """What one function's calls came to: counts, each different failure told once, the run ended where it is too many.

    Args:
        name: the function's.
        config: `on_failure`, `max_failure_rate`.
        pool: what a failed call is repeated with.
        folder: the run's; where `reward_failure.json` goes. None: it is not written.
    """

    def __init__(self, name: str, config: RewardConfig, pool: WorkerPool, folder: Path | None):
        self.name, self.pool, self.folder = name, pool, folder
        self.on_failure, self.max_rate = str(config.on_failure), float(config.max_failure_rate)
        self.counts: Counter[str] = Counter()  # statuses of all batches
        self._window: deque[list[int]] = deque(maxlen=WINDOW)  # [failed, completions] a batch
        self._told: set[str] = set()
        self._slow = False

    def begin(self, count: int) -> None:
        self._window.append([0, count])

    def failed(self, failure: Failure) -> None:
        """Count a failure.

        Raises:
            UserError: `on_failure` is abort, or there have been too many.
        """
        self._window[-1][0] += 1
        failures, total = (sum(column) for column in zip(*self._window, strict=True))
        enough = failures >= FEW or len(self._window) == WINDOW or not self.max_rate
        if self.on_failure == "abort":
            raise UserError(f"{failure.message}; reward.on_failure=abort{self._kept(failure)}")
        if enough and failures > self.max_rate * total:
            rate = f"{failures} of the last {total} completions failed (reward.max_failure_rate={self.max_rate:g})"
            raise UserError(f"{failure.message}; {rate}{self._kept(failure)}")
        self._tell(failure)

    def finished(self, batch: Batch) -> None:
        """Count a batch's statuses."""
        self.counts.update(batch.statuses)
        if batch.in_pieces and not self._slow and set(batch.statuses) <= {"ok", "nan"}:
            self._slow = True  # nobody is guilty, but every batch of this kind costs the time twice
            print(f"{batch.in_pieces}; in smaller calls the same completions went well", file=sys.stderr, flush=True)

    def _tell(self, failure: Failure) -> None:
        text = f"{failure.status}: {failure.message}"
        if text in self._told or len(self._told) >= SHOWN:
            return
        repeat = "" if self._told else self._kept(failure)  # one file: of the first, or of the one that ends the run
        self._told.add(text)
        outcome = "has no reward" if self.on_failure == "mask" else "gets 0"
        note = f"this completion {outcome} (reward.on_failure={self.on_failure}); shown once{repeat}"
        shown = [text, failure.traceback.strip("\n"), note]
        print("\n".join(part for part in shown if part), file=sys.stderr, flush=True)

    def _kept(self, failure: Failure) -> str:
        """Write the call down; how to repeat it."""
        if self.folder is None:
            return ""
        path = self.folder / "reward_failure.json"
        record = {
            "reward": self.name,
            "status": failure.status,
            "message": failure.message,
            "traceback": failure.traceback,
            "timeout": self.pool.timeout,
            "start": self.pool.start,
            "request": failure.request,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            return f"; could not write {path}: {error.strerror}"
        return f"; repeat it: python -m slothrl.reward_worker --reproduce {shlex.quote(str(path))}"
