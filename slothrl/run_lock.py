"""One writer a run folder: two runs in one folder would tear each other's checkpoints and metrics."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slothrl.errors import UserError

LOCK = "run.lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock inside; the kernel lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{folder}: another run writes here ({_holder(file)}): stop it first") from None
            # Some network filesystems have no locks.
            print(f"note: {folder / LOCK} cannot be locked ({error.strerror}); nothing guards against a second run")
            yield
            return
        file.truncate(0)
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(record) + "\n")
        file.flush()
        yield


def _holder(file) -> str:
    try:
        file.seek(0)
        record = json.loads(file.read())
        return f"process {record['pid']} on {record['host']}, since {record['since']}"
    except (ValueError, KeyError):
        return "it has just begun"
