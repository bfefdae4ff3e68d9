"""The code that runs beside a candidate in its sandbox: calls its functions, or runs it once an input.

It is only asked what the candidate gives for an input, never whether that is right. A candidate that takes the driver
over can therefore make results up, but has to make up the right ones.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from .values import ENCODER

# `frame` parts results from whatever else was printed. The nonce is new in every run, so no completion can hold it.
_COMMON = """\
import os, sys
SOURCE, WORK, FRAME = __PAYLOAD__
OUT = os.dup(1)
RUN = compile
def send(data):
    while data:
        data = data[os.write(OUT, data):]
def told():
    sys.__excepthook__(*sys.exc_info())
def module(name):
    made = sys.modules[name] = type(sys)(name)
    made.__dict__["__builtins__"] = __builtins__
    return made.__dict__
def wait_for_threads():
    if "threading" in sys.modules:
        threading = sys.modules["threading"]
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
"""
_CALLS = """
from _json import encode_basestring_ascii as quote
inf, nan = float("inf"), float("nan")
null = os.open("/dev/null", os.O_RDWR)
os.dup2(null, 0)
os.dup2(null, 1)
def main():
    space = module("candidate")
    try:
        exec(RUN(SOURCE, "candidate.py", "exec", 0, True), space)
    except SystemExit:
        pass
    for call in WORK:
        try:
            if type(call) is str:
                value = eval(RUN(call, "call", "eval", 0, True), space)
            else:
                value = eval(call[0], space)(*call[1], **call[2])
            text = encode(value)
        except BaseException:
            told()
            text = "raised"
        send(FRAME + text.encode("ascii"))
main()
"""
_INPUTS = """
import atexit
def main():
    code = RUN(SOURCE, "program.py", "exec", 0, True)
    for text in WORK:
        with open("stdin.txt", "wb") as file:
            file.write(text)
        source = os.open("stdin.txt", os.O_RDONLY)
        if source:  # 0 itself, where the candidate has closed it
            os.dup2(source, 0)
            os.close(source)
        os.dup2(OUT, 1)
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
        mine = sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
        send(FRAME + b"begin\\n")
        end = b"end"
        try:
            exec(code, module("__main__"))
            wait_for_threads()
        except SystemExit:
            pass
        except BaseException:
            told()
            end = b"raised"
        for finish in (atexit._run_exitfuncs, sys.stdout.flush, mine.flush):
            try:
                finish()
            except BaseException:
                pass
        send(FRAME + end)
main()
"""


def calls_program(source: str, calls: Sequence[str | tuple[str, Sequence[Any], dict[str, Any]]]) -> tuple[str, str]:
    """A program that prints what each call gives.

    Args:
        source: the candidate.
        calls: expressions, or (expression of a function, positional arguments, keyword arguments).

    Returns:
        The program and its frame.
    """
    return _program(_COMMON + ENCODER + _CALLS, source, list(calls))


def inputs_program(source: str, inputs: Sequence[str]) -> tuple[str, str]:
    """A program that runs the candidate once an input, as `__main__`, with that input as its stdin.

    Returns:
        The program and its frame.
    """
    return _program(_COMMON + _INPUTS, source, [text.encode("utf-8", "replace") for text in inputs])


def read_calls(stdout: str, frame: str, count: int) -> list[str | None]:
    """The encoded values in what a `calls_program` printed; None where a call raised or never came to its end."""
    parts = [part if part != "raised" else None for part in stdout.split(frame)[1:]]
    return (parts + [None] * count)[:count]


def read_outputs(stdout: str, frame: str, count: int, ended: bool) -> list[str | None]:
    """What was printed for each input; None where the candidate raised, was stopped or did not get that far.

    Args:
        stdout: of an `inputs_program`.
        frame: its frame.
        count: of inputs.
        ended: the process ended by itself with exit code 0; a candidate that did so on its own (`os._exit`) has what
            it printed up to there, and nothing for the inputs after it. Anybody can claim that: it wins nothing.
    """
    found: list[str | None] = []
    finished = True
    for part in stdout.split(frame)[1:]:
        if part.startswith("begin\n"):
            found.append(part.removeprefix("begin\n"))
            finished = False
        elif found:
            finished = True
            if part == "raised":
                found[-1] = None
    if found and not (finished or ended):
        found[-1] = None
    return (found + [None] * count)[:count]


def _program(text: str, source: str, work: list[Any]) -> tuple[str, str]:
    frame = f"\0{secrets.token_hex(16)}\0"
    # A lone surrogate in the source has no UTF-8 form; "?" makes it the syntax error that it would be anyway.
    source = source.encode("utf-8", "replace").decode("utf-8")
    return text.replace("__PAYLOAD__", repr((source, work, frame.encode("ascii")))), frame
