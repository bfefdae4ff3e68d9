"""Worker processes for reward functions: hard deadlines, and what is left of a batch when a call fails.

The parent moves bytes and watches the clock in one loop over all workers, without threads: a function that never gives
the interpreter back, crashes or prints a gigabyte costs its own process only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slothrl import reward_worker

STATUSES = ("ok", "exception", "timeout", "crash", "out_of_memory", "wrong_length", "wrong_type", "nan")
FATAL = ("timeout", "crash", "out_of_memory")  # the process is gone, a new try is dear: completions go one by one
START_SECONDS = 120.0  # to import what the function's module imports
OUTPUT_KEPT = 16_384  # bytes of what a function printed; the rest is read and dropped
ANSWER_MOST = 1 << 28  # bytes of scores and logs: the trainer's memory is not the function's to fill
_CHUNK = 1 << 20
_SIGNALS = {int(number): number.name for number in signal.Signals}  # the real-time ones have no names
_LIVE: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """A process with one reward function in it, killed when an answer is late and started again when next needed.

    Args:
        start: what `slothrl.reward_worker.serve` reads first.
        name: the function's, for messages.
        timeout: seconds between a request and its answer.
        files: {path: SHA-256} of the files that the function is made of, as its first process saw them; shared by the
            workers of one function. A later process that sees another one is refused.

    Attributes:
        described: what the process said about its function.
        result: the answer, or a failure with `status` and `message`; None while there is none.
        deadline: when the process is killed, in `time.monotonic()`'s seconds.
    """

    def __init__(self, start: dict[str, Any], name: str, timeout: float, files: dict[str, str]):
        self.start, self.name, self.timeout, self.files = start, name, timeout, files
        self.described: dict[str, Any] = {}
        self.result: dict[str, Any] | None = None
        self.deadline = math.inf
        self._process: subprocess.Popen | None = None
        self._loaded = False
        self._request: bytes | None = None
        self._outgoing = memoryview(b"")
        self._incoming, self._output = bytearray(), b""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ask(self, request: bytes | None = None) -> None:
        """Begin a call, in a new process where there is none; `drive` brings its end. None: only load the function."""
        self.result, self._request, self._output = None, request, b""
        if self._process is None or self._process.poll() is not None or not self._loaded:
            self._spawn()
        elif request is not None:
            self._send(request, self.timeout)

    def _spawn(self) -> None:
        self.close()
        self._process = subprocess.Popen(
            # By path, and -P: nothing in the working directory can stand in for a module of ours or of Python's.
            [sys.executable, "-P", reward_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=self.start["cwd"],
            start_new_session=True,  # Ctrl-C is for the run; and its whole group can be killed
        )
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        _LIVE.add(self)
        self._send(encoded(self.start), START_SECONDS)

    def _send(self, line: bytes, seconds: float) -> None:
        self._outgoing, self._incoming = memoryview(line), bytearray()
        self.deadline = time.monotonic() + seconds

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Register what this worker waits for; `key.data` is to be called with the stream."""
        process = self._process
        assert process is not None and process.stdin and process.stdout and process.stderr
        selector.register(process.stdout, selectors.EVENT_READ, self._read_answer)
        if not process.stderr.closed:
            selector.register(process.stderr, selectors.EVENT_READ, self._read_output)
        if self._outgoing:
            selector.register(process.stdin, selectors.EVENT_WRITE, self._write)

    def _write(self, stream: Any) -> None:
        try:
            self._outgoing = self._outgoing[os.write(stream.fileno(), self._outgoing[:_CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:  # it is gone; its stdout says so too
            self._outgoing = memoryview(b"")

    def _read_output(self, stream: Any) -> bool:
        """Whether there was something."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(stream.fileno(), _CHUNK)
            self._output = (self._output + data)[-OUTPUT_KEPT:]
            if not data:
                stream.close()
            return bool(data)
        return False

    def _read_answer(self, stream: Any) -> None:
        data = os.read(stream.fileno(), _CHUNK)
        self._incoming += data
        if data.endswith(b"\n"):
            self._on_answer(json.loads(self._incoming))
        elif not data:
            self._on_end()
        elif len(self._incoming) > ANSWER_MOST:
            self.close()
            self._fail("out_of_memory", f"reward {self.name} logged more than {ANSWER_MOST >> 20} MiB in one call")

    def _on_answer(self, record: dict[str, Any]) -> None:
        self._incoming = bytearray()
        if self._loaded:
            self.result = record
            if record.get("status") == "out_of_memory":  # what it holds would fail the next call as well
                self.close()
        elif "failed" in record:
            self.close()
            memory = re.search("MemoryError|llocate|map segment", record["failed"])
            knob = f"; reward.memory_gb={self.start['memory_gb']:g} may be too little" if memory else ""
            self.result = {"status": "load", "message": record["failed"] + knob}
        elif changed := self._changed(record["files"]):
            self.close()
            self.result = {"status": "load", "message": changed}
        else:
            self._loaded, self.described = True, record
            if self._request is None:
                self.result = {"status": "ready"}
            else:
                self._send(self._request, self.timeout)

    def _changed(self, files: dict[str, str]) -> str:
        """What is wrong where a file was edited since the first process read it, "" where none was."""
        for path, digest in files.items():
            if (first := self.files.setdefault(path, digest)) != digest:
                return (
                    f"reward {self.name}: {path} was edited in mid-run (sha256 {first[:12]} at the start, now "
                    f"{digest[:12]}) and would be read anew; put the old file back and resume, or begin a new run"
                )
        return ""

    def _on_end(self) -> None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):  # its own exit status, not that of our kill
            self._process.wait(1.0)
        while self._process.stderr and not self._process.stderr.closed and self._read_output(self._process.stderr):
            pass
        code, printed = self.close(), self.printed
        ended = f"by signal {_SIGNALS.get(-code, -code)}" if code < 0 else f"with exit code {code}"
        memory = code == -signal.SIGKILL or re.search(r"\bMemoryError\b|bad_alloc", printed)
        doubt = "; out of memory? set reward.memory_gb" if memory else ""
        message = f"reward {self.name}: its process ended {ended}{self._place(printed)}{doubt}"
        self._fail("out_of_memory" if memory else "crash", message)

    def late(self) -> None:
        """End a call whose time is up."""
        process, loaded = self._process, self._loaded
        assert process is not None and process.stderr
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGABRT)  # faulthandler prints where it is, even amid a long C call
        patience = time.monotonic() + 0.3
        while time.monotonic() < patience and not process.stderr.closed:
            if not self._read_output(process.stderr):
                time.sleep(0.005)
        self.close()
        where = self._place(self.printed)
        seconds = f"{self.timeout:g} s (reward.timeout)" if loaded else f"{START_SECONDS:g} s to load"
        self._fail("timeout" if loaded else "load", f"reward {self.name} took more than {seconds}{where}")

    def _fail(self, status: str, message: str) -> None:
        self.result = {"status": status, "message": message, "traceback": self.printed}

    def _place(self, printed: str) -> str:
        file = self.described.get("file") or ""
        found = re.search(rf'File "{re.escape(file)}", line (\d+)', printed) if file else None
        return f", at {Path(file).name}, line {found[1]}" if found else ""

    @property
    def printed(self) -> str:
        """The end of what the function printed in this call."""
        return self._output.decode(errors="replace")

    def close(self) -> int:
        """Kill the process and what it started, if it runs; returns its exit status."""
        process, self._process, self._loaded, self.deadline = self._process, None, False, math.inf
        if process is None:
            return 0
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        _LIVE.discard(self)
        return code


def drive(workers: Sequence[Worker]) -> None:
    """Move the bytes of busy workers, and kill the late ones, until at least one has a result."""
    while not any(worker.result for worker in workers):
        with selectors.PollSelector() as selector:
            for worker in workers:
                worker.watch(selector)
            wait = min(worker.deadline for worker in workers) - time.monotonic()
            ready = selector.select(max(0.0, wait))
        for key, _ in ready:
            if not key.fileobj.closed:  # pyright: ignore - an end read from one pipe closes the others
                key.data(key.fileobj)
        now = time.monotonic()
        for worker in workers:
            if worker.result is None and now >= worker.deadline:
                worker.late()


class WorkerPool:
    """The workers of one reward function.

    Args:
        start: what each worker is started with.
        name: the function's.
        count: how many workers.
        timeout: seconds a call.
    """

    def __init__(self, start: dict[str, Any], name: str, count: int, timeout: float):
        self.start, self.name, self.timeout = start, name, timeout
        files: dict[str, str] = {}
        self.workers = [Worker(start, name, timeout, files) for _ in range(count)]
        weakref.finalize(self, _close_all, self.workers)  # a run that was given up leaves no process behind

    @property
    def described(self) -> dict[str, Any]:
        return self.workers[0].described

    def close(self) -> None:
        """End the processes; the next call starts them again."""
        _close_all(self.workers)


def load(pools: Sequence[WorkerPool]) -> list[str | None]:
    """Start all workers at once and wait for them; what went wrong in each pool, None where nothing did."""
    workers = [worker for pool in pools for worker in pool.workers]
    for worker in workers:
        worker.ask()
    while waiting := [worker for worker in workers if worker.result is None]:
        drive(waiting)
    return [
        next((str(w.result["message"]) for w in pool.workers if w.result and w.result["status"] != "ready"), None)
        for pool in pools
    ]


@contextlib.contextmanager
def closing_workers() -> Iterator[None]:
    """End the workers that were started inside, however it is left."""
    before = set(_LIVE)
    try:
        yield
    finally:
        _close_all([worker for worker in set(_LIVE) if worker not in before])


def encoded(record: dict[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(record).encode() + b"\n"


def _close_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.close()


atexit.register(lambda: _close_all(list(_LIVE)))
