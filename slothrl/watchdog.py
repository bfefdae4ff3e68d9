"""A deadline on a block of code that may never come back, such as a rollout of a hung engine."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 1
GRACE = 3.0  # seconds that the friendly message has before the last resort


@contextmanager
def deadline(seconds: float | None, what: str, folder: Path, advice: str) -> Iterator[None]:
    """End the process where the block takes longer, with every thread's stack in `folder/hang.txt`.

    A hung engine cannot be asked to return, and its memory only goes with the process. The message comes from a
    thread of Python's; where even that is stuck, because C code holds the interpreter's lock, faulthandler's own
    thread ends the process a few seconds later.

    Args:
        seconds: None or 0: no deadline.
        what: names the block in the message.
        advice: the message's end: how to go on.
    """
    if not seconds:
        yield
        return
    path = folder / "hang.txt"
    with path.open("w", encoding="utf-8") as file:
        timer = threading.Timer(seconds, _end, (seconds, what, path, file, advice))
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=file)
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
    path.unlink(missing_ok=True)


def _end(seconds: float, what: str, path: Path, file, advice: str) -> None:
    print(f"error: {what} took more than {seconds:g} s and is given up; where it hung: {path}", file=sys.stderr)
    print(f"error: {advice}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=file, all_threads=True)
    file.flush()
    os._exit(EXIT_CODE)
