"""`run_python`, which runs nothing before the sandbox of this machine has been proven to hold."""

from __future__ import annotations

import threading
import warnings

from . import selftest
from .bwrap import Jail, SandboxUnavailable, jails
from .limits import Limits
from .process import DEFAULT, Outcome, run_in
from .seccomp import UnknownMachine

_lock = threading.Lock()
_ready: dict[str | None, Jail] = {}
_none: dict[str | None, SandboxUnavailable] = {}  # for `unsafe` only: else every program would try again


def run_python(
    program: str, stdin: str = "", limits: Limits = DEFAULT, python: str | None = None, unsafe: bool = False
) -> Outcome:
    """Run a Python program that nobody has looked at.

    It sees the standard library, an empty /tmp, and nothing of the machine: no network, no other process, no home
    folder, no environment. Threads are allowed, processes are not. Safe to call from several threads at once.

    Args:
        program: source text; `__name__` is "__main__".
        stdin: what it reads.
        limits: bounds of this run.
        python: interpreter for the inside; default: the system's, else the one behind `sys.executable`.
        unsafe: where there is no sandbox, run it as a plain process: resource limits only, full access to the machine.

    Returns:
        The outcome; never raises for what the program does.

    Raises:
        SandboxUnavailable: no sandbox can be had, and not `unsafe`.
    """
    try:
        if unsafe and python in _none:
            raise _none[python]
        jail: Jail | None = self_test(python)
    except SandboxUnavailable as error:
        if not unsafe:
            raise
        _none[python] = error
        warnings.warn(f"UNSAFE: untrusted code runs WITHOUT a sandbox. {error}", RuntimeWarning, stacklevel=2)
        jail = None
    return run_in(jail, program, stdin, limits)


def self_test(python: str | None = None) -> Jail:
    """Prove that the sandbox holds; done once a process, at first use.

    Args:
        python: interpreter for the inside; default as in `run_python`.

    Returns:
        The way to start it that passed: a plain program works; processes, network, writing outside, reading the home
        folders and files of this machine are refused.

    Raises:
        SandboxUnavailable: none passed; the message says what was tried and what helps.
    """
    with _lock:
        if python not in _ready:
            _ready[python] = _first_that_holds(python)
        return _ready[python]


def _first_that_holds(python: str | None) -> Jail:
    tried = []
    for jail in jails(python):
        try:
            problem = selftest.problem(lambda text, jail=jail: run_in(jail, text))
        except (OSError, UnknownMachine) as error:
            problem = str(error)
        if not problem:
            return jail
        tried.append(f"{' '.join(jail.start)} {jail.python}: {problem}")
    hint = (
        "It needs bubblewrap 0.8 or newer (apt-get install bubblewrap) and user namespaces, which containers often deny"
    )
    raise SandboxUnavailable(f"no sandbox for untrusted code. {hint}. Tried: {'; '.join(tried)}")
