"""Batches on their way through reward workers: a call that fails is taken apart until only the guilty are left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slothrl.errors import UserError
from slothrl.reward_workers import FATAL, Worker, WorkerPool, drive, encoded


@dataclass(frozen=True)
class Failure:
    """Why one completion has no score.

    Attributes:
        request: the call on this completion alone, as the worker got it.
    """

    status: str
    message: str
    traceback: str
    request: dict[str, Any]


@dataclass
class Batch:
    """One function's work on one batch.

    Args:
        pool: whose workers do it.
        columns: prompts, completions and the others, a list element a completion.
        state: the trainer's, as plain values.
        failed: called for each completion that cannot be scored; may raise to end the run.

    Attributes:
        scores, statuses: one a completion; a failed one's score is None.
        logs: (completions, what the function logged) of each call that succeeded.
        in_pieces: the reason why the batch was not scored in one call, where a whole call failed.
    """

    pool: WorkerPool
    columns: dict[str, Any]
    state: dict[str, Any] | None
    failed: Callable[[Failure], None]
    in_pieces: str = ""
    queue: deque[list[int]] = field(default_factory=deque)
    logs: list[tuple[list[int], list[list[Any]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = len(self.columns["completions"])
        self.scores: list[float | None] = [None] * self.count
        self.statuses: list[str] = [""] * self.count
        share = -(-self.count // len(self.pool.workers))  # completions a worker, rounded up
        self.queue.extend(list(range(i, min(i + share, self.count))) for i in range(0, self.count, max(share, 1)))

    def request(self, piece: Sequence[int]) -> dict[str, Any]:
        """The call on the completions with these indices."""
        columns = self.columns
        if len(piece) < self.count:
            columns = {
                name: [values[i] for i in piece] if isinstance(values, list) and len(values) == self.count else values
                for name, values in columns.items()
            }
        return {"columns": columns, "trainer_state": self.state}

    def take(self, piece: list[int], result: dict[str, Any]) -> None:
        """Note how a call ended; what has to be tried again joins the queue.

        Raises:
            UserError: the function could not be loaded again.
        """
        status = result.get("status")
        if status == "load":
            raise UserError(result["message"])
        if status is None:
            self._score(piece, result)
        elif len(piece) == 1:
            self._fail(piece[0], status, result)
        else:
            self.in_pieces = result["message"]
            half = len(piece) // 2
            parts = [[index] for index in piece] if status in FATAL else [piece[:half], piece[half:]]
            self.queue.extendleft(reversed(parts))

    def _score(self, piece: list[int], result: dict[str, Any]) -> None:
        self.logs.append((piece, result["logs"]))
        for index, score, status in zip(piece, result["scores"], result["statuses"], strict=True):
            self.scores[index], self.statuses[index] = score, status
        for index in piece:
            if self.statuses[index] not in ("ok", "nan"):
                self._fail(index, self.statuses[index], result)

    def _fail(self, index: int, status: str, result: dict[str, Any]) -> None:
        self.statuses[index] = status
        self.failed(Failure(status, result["message"], result.get("traceback", ""), self.request([index])))

    def replay(self, log_metric: Callable[[str, float], None], log_extra: Callable[[str, list], None]) -> None:
        """Hand on what the function logged; a column gets None for completions without a score."""
        columns: dict[str, list[Any]] = {}
        for piece, logs in sorted(self.logs, key=lambda entry: entry[0]):
            for kind, name, value in logs:
                if kind == "metric":
                    log_metric(name, value)
                elif len(piece) == self.count:
                    log_extra(name, value)
                elif len(value) == len(piece):
                    column = columns.setdefault(name, [None] * self.count)
                    for index, item in zip(piece, value, strict=True):
                        column[index] = item
        for name, values in columns.items():
            log_extra(name, values)


def run_batches(batches: Sequence[Batch]) -> None:
    """Bring all batches to their end, all workers at once. However this is left, no call is under way."""
    busy: dict[Worker, tuple[Batch, list[int]]] = {}
    try:
        while True:
            for batch in batches:
                for worker in batch.pool.workers:
                    if batch.queue and worker not in busy:
                        piece = batch.queue.popleft()
                        worker.ask(encoded(batch.request(piece)))
                        busy[worker] = (batch, piece)
            if not busy:
                return
            drive(list(busy))
            for worker in [worker for worker in busy if worker.result]:
                batch, piece = busy.pop(worker)
                batch.take(piece, worker.result or {})
    finally:
        for worker in busy:
            worker.close()
