"""The child process around one reward function; `slothrl.reward_workers` starts it and they exchange lines of JSON.

It imports the standard library, the light half of slothrl and the function's own module, never torch or TRL of its own
accord. `python -m slothrl.reward_worker --reproduce FILE` repeats a call that failed in a run, here and in the open.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import json
import os
import resource
import signal
import sys
import sysconfig
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1


class Function:
    """A reward function as a worker holds it: loaded once, with its module's state and its own event loop.

    Args:
        start: `function` (its name as in reward.functions), `params`, `root` (for relative files).

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, start: dict[str, Any]):
        from slothrl.rewards import AsyncReward, load_reward  # not before sys.path is the parent's

        self.reward = load_reward(start["function"], 1.0, start["params"], Path(start["root"]))
        self._runner = None
        if isinstance(self.reward, AsyncReward):
            import asyncio

            self._runner = asyncio.Runner()  # one loop a worker: a client that the module keeps stays usable

    def described(self) -> dict[str, Any]:
        """What the parent has to know in order to call it."""
        from slothrl.rewards import code_of

        reward, function = self.reward, self.reward.function
        code = code_of(function)
        return {
            "name": reward.name,
            "source": reward.source,
            "named": reward.named,
            "required": reward.required,
            "takes_all": reward.takes_all,
            "needs_main_process": bool(getattr(function, "needs_main_process", False)),
            "file": code.co_filename if code else "",
            "files": imported_files(),
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call it once.

        Args:
            request: `columns` (with prompts and completions), `trainer_state`.

        Returns:
            `scores`, `statuses` (ok, nan or wrong_type a completion) and `logs`; or, where the call as a whole failed,
            its `status`. Both with `message` and `traceback`, empty where nothing went wrong.
        """
        logs: list[list[Any]] = []
        given = request["columns"] | {
            "trainer_state": _state(request.get("trainer_state")),
            "log_metric": lambda name, value: logs.append(["metric", str(name), float(value)]),
            "log_extra": lambda column, values: logs.append(["extra", str(column), list(values)]),
        }
        try:
            scores = self._call(self.reward.arguments(given))
        except (Exception, SystemExit) as error:
            memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
            return self._failed("out_of_memory" if memory else "exception", error)
        return {**self._judged(scores, len(given["completions"])), "logs": logs}

    def _call(self, arguments: dict[str, Any]) -> Any:
        scores = self.reward.function(**arguments)
        return self._runner.run(scores) if self._runner else scores

    def _failed(self, status: str, error: BaseException) -> dict[str, Any]:
        from slothrl.errors import UserError

        message = str(error if isinstance(error, UserError) else self.reward.raised(error))
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename != __file__][-10:]  # a recursion has a thousand
        text = "".join(traceback.format_list(own) + traceback.format_exception_only(error))
        return {"status": status, "message": message, "traceback": text[-4000:]}

    def _judged(self, scores: Any, count: int) -> dict[str, Any]:
        from slothrl.errors import UserError
        from slothrl.rewards import number

        try:
            scores = scores.tolist() if hasattr(scores, "tolist") else scores
            scores = self.reward.listed(scores, count)
        except UserError as error:
            return self._failed("wrong_length" if isinstance(scores, list | tuple) else "wrong_type", error)
        values, statuses, message = [], [], ""
        for position, score in enumerate(scores, start=1):
            try:
                values.append(number(score, position))
                statuses.append("nan" if values[-1] is None and score is not None else "ok")
            except UserError as error:  # only this completion's fault
                values.append(None)
                statuses.append("wrong_type")
                message = message or f"reward {self.reward.name} returned {error}"
        return {"scores": values, "statuses": statuses, "message": message, "traceback": ""}


def imported_files() -> dict[str, str]:
    """SHA-256 of each imported source file that was not installed: the function's own and what it is made of."""
    found = {}
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py"):
            continue
        if not path.startswith(installed) and "/dist-packages/" not in path:
            with contextlib.suppress(OSError):
                found[os.path.abspath(path)] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found


def _state(given: dict[str, Any] | None) -> SimpleNamespace | None:
    return None if given is None else SimpleNamespace(**given)


def limit(memory_gb: float) -> None:
    """Bound this process's address space (GiB), and let a crash leave no core file."""
    for kind, value in ((resource.RLIMIT_AS, int(memory_gb * 2**30)), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def serve() -> None:
    """Load the function that the first line names, then answer a line with a line until there are no more."""
    requests, answers = _protocol()
    if sys.platform == "linux":  # a parent that is killed cannot end a busy worker, so the kernel does
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.enable()  # says where it was when it crashed, or when the parent lost patience and sent SIGABRT
    start = json.loads(requests.readline())
    sys.path[:] = start["path"]
    try:
        limit(start["memory_gb"])
        function = Function(start)
    except (Exception, SystemExit) as error:
        _write(answers, {"failed": " ".join(str(error).split()) or type(error).__name__})
        return
    _write(answers, function.described())
    for line in requests:
        _write(answers, function.answer(json.loads(line)))


def _protocol() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for the protocol; what the function prints goes to stderr, and it finds nothing to read."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, answers


def _write(answers: BinaryIO, record: dict[str, Any]) -> None:
    for stream in (sys.stdout, sys.stderr):  # what was printed belongs to this call
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the function closed or replaced it
            continue
    answers.write(json.dumps(record, default=str).encode() + b"\n")
    answers.flush()


def reproduce(path: Path) -> int:
    """Repeat the call that a run left in `path`, in this process; 0 where it works now, 1 where it fails."""
    record = json.loads(path.read_text(encoding="utf-8"))
    start, request = record["start"], record["request"]
    sys.path.extend(folder for folder in start["path"] if folder not in sys.path)
    print(f"in the run: {record['status']}: {record['message']}")
    print(f"now, at most {record['timeout']:g} s and {start['memory_gb']:g} GiB:", flush=True)
    limit(start["memory_gb"])
    faulthandler.enable()
    faulthandler.dump_traceback_later(record["timeout"], exit=True)  # exit code 1
    answer = Function(start).answer(request)
    faulthandler.cancel_dump_traceback_later()
    status = next((status for status in answer.get("statuses", []) if status != "ok"), answer.get("status", "ok"))
    print(f"{answer['traceback']}{status}: {answer['message'] or answer['scores']}")
    return 0 if status in ("ok", "nan") else 1


def main(argv: list[str] | None = None) -> int:
    """Without arguments a worker; with `--reproduce FILE` one call of a run again."""
    parser = argparse.ArgumentParser(prog="python -m slothrl.reward_worker", description=__doc__)
    parser.add_argument("--reproduce", metavar="FILE", type=Path, help="reward_failure.json of a run's folder")
    path = parser.parse_args(argv).reproduce
    if path is None:
        serve()
        return 0
    from slothrl.errors import UserError

    try:
        return reproduce(path)
    except (OSError, ValueError, KeyError, UserError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
