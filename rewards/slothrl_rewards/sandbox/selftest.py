"""Does the sandbox hold? A program that tries to get out of it, judged from outside."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

# Prints one word a probe: "refused", or what happened instead.
_PROBE = """\
import os
def probe(name, attempt):
    try:
        print(name, "worked:", repr(attempt())[:80])
    except OSError:
        print(name, "refused")
def network():
    import socket
    return socket.socket()
def write(path):
    with open(path, "w") as file:
        return file.write("x")
with open("/tmp/own", "w") as file:
    file.write("42")
print("plain", open("/tmp/own").read())
probe("fork", os.fork)
probe("network", network)
for path in ("/x", "/dev/x", "/opt/x", "/usr/x", "/etc/x"):
    probe("write" + path, lambda: write(path))
for path in __READ__:
    probe("read" + path, lambda: os.listdir(path) if os.path.isdir(path) else open(path).read())
print("environment", sorted(os.environ))
"""
_ENVIRONMENT = {"HOME", "TMPDIR", "PATH", "LANG", "LD_LIBRARY_PATH", "LC_CTYPE", "PWD"}


def problem(run: Callable[[str], Any]) -> str:
    """Try the sandbox.

    Args:
        run: runs a program in it, giving an `Outcome`.

    Returns:
        "" if it holds, else what is wrong.
    """
    with tempfile.NamedTemporaryFile("w", prefix="canary-") as canary:
        canary.write("secret")
        canary.flush()
        read = ["/root", os.path.expanduser("~"), "/home", "/etc/passwd", "/proc/1/environ", canary.name]
        read = [path for path in dict.fromkeys(read) if path not in ("/", "/tmp")]
        outcome = run(_PROBE.replace("__READ__", repr(read)))
    if outcome.status != "ok":
        return f"{outcome.status}: {outcome.detail}"
    lines = outcome.stdout.splitlines()
    if not lines or lines[0] != "plain 42":
        return f"a plain program printed {outcome.stdout[:80]!r}"
    if len(lines) != 2 + 2 + 5 + len(read):
        return "the self-test did not finish"
    worked = [line for line in lines[1:-1] if not line.endswith(" refused")]
    if worked:
        return f"not contained: {'; '.join(worked)}"
    name, _, names = lines[-1].partition(" ")
    variables = set(names.strip("[]").replace("'", "").replace(" ", "").split(",")) if name == "environment" else {"?"}
    return "" if variables <= _ENVIRONMENT else f"the environment leaks {sorted(variables - _ENVIRONMENT)}"
