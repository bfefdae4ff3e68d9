"""One untrusted program in one sandbox: started, fed, read with a cap, ended in time, and gone afterwards."""

from __future__ import annotations

import json
import os
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from .bwrap import Jail
from .limits import Limits, launcher
from .seccomp import program as seccomp_program

Status = Literal["ok", "wrong", "timeout", "crash", "infra"]
_CHUNK = 1 << 16
DEFAULT = Limits()
_GONE_SECONDS = 10.0
_LOOK_SECONDS = 0.1  # between two counts of the files; most programs end before the first


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Args:
        status: "ok" it ended by itself, with exit code 0 (which proves nothing: the verdict is made from `stdout`);
            "timeout"; "crash" another end, too much output included; "infra" the sandbox failed, not the program.
            "wrong" is for those who judge the output.
        stdout, stderr: decoded with replacement characters, cut at `Limits.output_bytes`.
        seconds: wall time, the sandbox's start included.
        detail: why, in words; "" for "ok".
        sandboxed: False only with `unsafe=True`.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    detail: str = ""
    sandboxed: bool = True


def run_in(jail: Jail | None, program: str, stdin: str = "", limits: Limits = DEFAULT) -> Outcome:
    """`run_python` in a given jail, without the self-test; None: in no jail at all."""
    began = time.monotonic()
    with ExitStack() as stack:
        try:
            run = _Run(stack, jail, program, limits)
        except OSError as error:
            return Outcome("infra", detail=f"could not start: {error}", sandboxed=jail is not None)
        run.pump(stdin.encode("utf-8", "replace"))
        return run.outcome(time.monotonic() - began)


class _Run:
    """One process with its pipes. The thread that makes it must outlive it: --die-with-parent looks at the thread."""

    def __init__(self, stack: ExitStack, jail: Jail | None, program: str, limits: Limits):
        self.stack, self.jail, self.limits, self.why, self.started = stack, jail, limits, "", False
        self.first = 0  # the number of the namespace's first process, once known
        self.disk: int | None = None  # a descriptor of the sandbox's /tmp
        given, closed = _program_file(stack, program), ExitStack()
        with closed:
            # One pipe, two ends to write: the launcher's says "begun"; bwrap's pid 1 holds the other, so that the end
            # of the file says "nothing is left".
            self.control, told = _pipe(stack, closed)
            self.info, first = _pipe(stack, closed)
            os.set_blocking(self.info, False)
            held = os.dup(told)
            closed.callback(os.close, held)
            command, descriptors = self._command(stack, closed, (held, first, given, told))
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=descriptors,
                env={}, cwd=self.folder, process_group=0, bufsize=0,
            )  # fmt: skip  # env: pid 1's would be visible to whoever gets to see /proc
        stack.callback(self._end)
        self.exited = os.pidfd_open(self.process.pid)
        stack.callback(os.close, self.exited)
        self.read: dict[int, bytearray] = {self._pipe("stdout"): bytearray(), self._pipe("stderr"): bytearray()}
        self.stdin = self._pipe("stdin")
        for descriptor in (*self.read, self.stdin, self.control):
            os.set_blocking(descriptor, False)

    def _command(
        self, stack: ExitStack, closed: ExitStack, ends: tuple[int, int, int, int]
    ) -> tuple[list[str], tuple[int, ...]]:
        """The command line and the descriptors it gets."""
        if self.jail is None:
            self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="slothrl-unsafe-"))
            python = shutil.which("python3") or sys.executable
            text = launcher(self.limits, count_threads=False)  # all of this user's processes would count
            return [python, "-I", "-S", "-X", "utf8", "-c", text, *map(str, ends[2:])], ends[2:]
        self.folder = "/"
        filter_end, filter_start = os.pipe()
        closed.callback(os.close, filter_end)
        with open(filter_start, "wb") as file:  # shorter than a pipe's buffer: written at once
            file.write(seccomp_program())
        return self.jail.command(self.limits, filter_end, *ends), (filter_end, *ends)

    def _pipe(self, name: str) -> int:
        return getattr(self.process, name).fileno()

    def pump(self, stdin: bytes) -> None:
        """Feed and read until the process ends, a deadline passes or there is too much output; then end it."""
        deadline, left = time.monotonic() + self.limits.start_seconds, memoryview(stdin)
        look = deadline  # when to count its files
        with selectors.DefaultSelector() as selector:
            for descriptor in (*self.read, self.control, self.exited):
                selector.register(descriptor, selectors.EVENT_READ)
            selector.register(self.stdin, selectors.EVENT_WRITE)
            while not self.why:
                wait = min(deadline, look) - time.monotonic()
                ready = {key.fd for key, _ in selector.select(max(0.0, wait))}
                if self.control in ready:
                    selector.unregister(self.control)
                    deadline = self._begin(deadline)
                    look = time.monotonic() + _LOOK_SECONDS
                if self.stdin in ready:
                    left = self._feed(selector, left)
                for descriptor in ready & set(self.read):
                    if not self._take(descriptor):
                        selector.unregister(descriptor)
                if self.exited in ready:
                    break
                if not self.why and time.monotonic() >= look:
                    look = time.monotonic() + _LOOK_SECONDS
                    self._count_files()
                if not self.why and time.monotonic() >= deadline:
                    self.why = "timeout"
        self._end()
        for descriptor in self.read:  # what it wrote last
            while not self.why and self._take(descriptor):
                pass

    def _begin(self, deadline: float) -> float:
        self.started = bool(os.read(self.control, 1))
        return time.monotonic() + self.limits.seconds if self.started else deadline

    def _feed(self, selector: selectors.BaseSelector, left: memoryview) -> memoryview:
        try:
            left = left[os.write(self.stdin, left[:_CHUNK]) :]
        except BlockingIOError:
            return left
        except OSError:  # it reads no more
            left = left[:0]
        if not left:
            selector.unregister(self.stdin)
            self.process.stdin.close()  # type: ignore[union-attr]
        return left

    def _take(self, descriptor: int) -> bool:
        """Read once; whether there may be more."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        kept = self.read[descriptor]
        kept += data[: self.limits.output_bytes - len(kept)]
        if len(data) and len(kept) >= self.limits.output_bytes:
            self.why = f"more than {self.limits.output_bytes} bytes of output"
        return bool(data)

    def _end(self) -> None:
        """Kill what still runs and wait until all of it is gone."""
        process = self.process
        if process.returncode is not None:
            return
        if process.poll() is None:
            self._end_first()
            try:
                os.killpg(process.pid, signal.SIGKILL)  # bwrap, and whatever is not yet in the new session
            except (ProcessLookupError, PermissionError):
                process.kill()
            process.wait()
        self.gone = self.jail is None or self._nothing_left()

    def _first_process(self) -> int:
        """The number of the namespace's first process; 0 where it is not that far yet, or gone."""
        try:
            self.first = self.first or int(json.loads(os.read(self.info, _CHUNK) or b"{}")["child-pid"])
            with open(f"/proc/{self.first}/stat", encoding="utf-8") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, KeyError):
            return 0
        return self.first if parent == self.process.pid else 0  # the number could be another's by now

    def _count_files(self) -> None:
        """Stop a program that has made too many; where /proc denies the look, the CPU limit alone bounds them."""
        if self.jail is None or (self.disk is None and not self._first_process()):
            return
        try:
            if self.disk is None:
                self.disk = os.open(f"/proc/{self.first}/root/tmp", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                self.stack.callback(os.close, self.disk)
            seen = os.fstatvfs(self.disk)
        except OSError:
            return
        if seen.f_files - seen.f_ffree > self.limits.files:
            self.why = f"more than {self.limits.files} files"

    def _end_first(self) -> None:
        """Kill the namespace's first process and wait for it: the kernel lets it go only after all the others.

        bwrap's death alone would have the same effect, but nobody could tell when.
        """
        try:
            handle = os.pidfd_open(self._first_process())
        except OSError:  # 0 is no process's number
            return
        try:
            if self._first_process():  # still the same one
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                ended = select.poll()  # select() fails on descriptors past 1023
                ended.register(handle, select.POLLIN)
                ended.poll(_GONE_SECONDS * 1000)
        except OSError:
            pass
        finally:
            os.close(handle)

    def _nothing_left(self) -> bool:
        deadline = time.monotonic() + _GONE_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline - time.monotonic())):
                data = os.read(self.control, _CHUNK)
                if not data:
                    return True
                self.started = True
        return False

    def outcome(self, seconds: float) -> Outcome:
        """The result, once `pump` has returned."""
        for stream in (self.process.stdout, self.process.stderr, self.process.stdin):
            if stream:
                stream.close()
        stdout, stderr = (bytes(data).decode("utf-8", "replace") for data in self.read.values())
        status, detail = self._judge(stderr)
        return Outcome(status, stdout, stderr, seconds, detail, self.jail is not None)

    def _judge(self, stderr: str) -> tuple[Status, str]:
        code = self.process.returncode
        if not self.gone:
            return "infra", f"the sandbox did not end within {_GONE_SECONDS:g} s"
        if not self.started:
            return "infra", stderr.strip()[-500:] or f"the sandbox did not start (exit code {code}) {self.why}".strip()
        if self.why == "timeout":
            return "timeout", f"still running after {self.limits.seconds:g} s"
        if self.why:
            return "crash", self.why
        # bwrap tells of a signal as 128 + its number, and a program can lie about that: a label, never a verdict.
        return ("ok", "") if code == 0 else ("crash", f"exit code {code}: {stderr.strip()[-200:]}")


def _program_file(stack: ExitStack, program: str) -> int:
    """The program in memory; inside, the launcher closes its descriptor before the first line runs."""
    descriptor = os.memfd_create("program")
    stack.callback(os.close, descriptor)
    with open(os.dup(descriptor), "wb") as file:
        file.write(program.encode("utf-8", "surrogatepass"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _pipe(kept: ExitStack, closed: ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe()
    kept.callback(os.close, reader)
    closed.callback(os.close, writer)
    return reader, writer
