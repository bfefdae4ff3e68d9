"""The bubblewrap command line, and what of the system an interpreter needs to see inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .limits import Limits, launcher

NOBODY = "65534"
# Where an interpreter from outside /usr appears inside, so that no home folder has to be shown for it.
_INSIDE = "/opt/python"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ISOLATED = (
    "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--clearenv",
    "--cap-drop", "ALL", "--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox",
)  # fmt: skip
# Modules that pull in the shared libraries which the standard library links to.
_PROBE = """\
import importlib, json, os, sys
for name in ("ctypes", "bz2", "lzma", "zlib", "hashlib", "decimal", "resource", "unicodedata", "sqlite3"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
with open("/proc/self/maps") as maps:
    libraries = sorted({line.split(None, 5)[5].strip() for line in maps if ".so" in line})
print(json.dumps({"version": sys.version_info[:2], "executable": os.path.realpath(sys.executable),
                  "prefix": os.path.realpath(sys.base_prefix), "stdlib": os.path.realpath(os.path.dirname(os.__file__)),
                  "libraries": libraries}))
"""


class SandboxUnavailable(RuntimeError):
    """No sandbox can be had on this machine; the message says why and what helps."""


@dataclass(frozen=True)
class Jail:
    """One way to start a sandboxed interpreter here.

    Args:
        start: the command up to and including bwrap.
        binds: bwrap's options for what is visible.
        python: the interpreter's path inside.
        limited_threads: whether RLIMIT_NPROC counts, i.e. whether the program runs as another user than root.
    """

    start: tuple[str, ...]
    binds: tuple[str, ...]
    python: str
    limited_threads: bool

    def command(self, limits: Limits, seccomp: int, sync: int, info: int, program: int, control: int) -> list[str]:
        """The whole command line.

        Args:
            limits: the bounds; bwrap gets the disk's, the launcher inside the others.
            seccomp: descriptor with the filter.
            sync: descriptor that is open as long as the sandbox lives.
            info: descriptor to which bwrap writes the number of the sandbox's first process.
            program: descriptor with the program.
            control: descriptor to which the launcher writes one byte before the program begins.
        """
        # No /proc at all: nothing inside needs it, and it would show pid 1's environment. One sized tmpfs is all that
        # can be written to; the root, a tmpfs of bwrap's without a size, must therefore be read-only.
        folders = ["--size", str(int(limits.disk_bytes)), "--tmpfs", "/tmp", "--symlink", "/tmp", "/dev/shm"]
        return [
            *self.start, *_ISOLATED, *self.binds, *folders, "--remount-ro", "/", "--chdir", "/tmp",
            "--seccomp", str(seccomp), "--sync-fd", str(sync), "--info-fd", str(info), "--",
            self.python, "-I", "-S", "-X", "utf8", "-c", launcher(limits), str(program), str(control),
        ]  # fmt: skip


def jails(python: str | None = None) -> list[Jail]:
    """The ways to try here, best first.

    Args:
        python: an interpreter; default: the system's, then the one behind `sys.executable`.

    Returns:
        Ways that look possible. Root first tries to become nobody: the kernel does not count root's threads.

    Raises:
        SandboxUnavailable: not Linux, no bwrap, or no interpreter.
    """
    bwrap = shutil.which("bwrap")
    if sys.platform != "linux":
        raise SandboxUnavailable("untrusted code runs in bubblewrap, which needs Linux")
    if not bwrap:
        raise SandboxUnavailable("untrusted code runs in bubblewrap: apt-get install bubblewrap (0.8 or newer)")
    found, setpriv = [], shutil.which("setpriv")
    for path in [python] if python else ["/usr/bin/python3", getattr(sys, "_base_executable", sys.executable)]:
        seen = _probe(path)
        if not seen:
            continue
        binds, inside = _binds(seen)
        if os.geteuid() != 0:
            found.append(Jail((bwrap,), binds, inside, True))
            continue
        if setpriv:
            nobody = (setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", bwrap)
            found.append(Jail(nobody, binds, inside, True))
        found.append(Jail((bwrap,), binds, inside, False))
    if not found:
        raise SandboxUnavailable("no Python 3.8 or newer for the sandbox: apt-get install python3")
    return found


def _probe(python: str) -> dict | None:
    """What an interpreter says about itself; None where it does not run or is too old."""
    try:
        done = subprocess.run([python, "-I", "-S", "-c", _PROBE], capture_output=True, timeout=60, env={}, check=True)
        seen = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return seen if tuple(seen["version"]) >= (3, 8) else None


def _binds(seen: dict) -> tuple[tuple[str, ...], str]:
    """bwrap's options that show the interpreter, its standard library and the system's shared libraries."""
    prefix, executable, stdlib = seen["prefix"], seen["executable"], seen["stdlib"]
    system = prefix == "/usr"  # any other finds its libpython only with the help of LD_LIBRARY_PATH
    target = prefix if system else _INSIDE
    shown: dict[str, str] = {}
    for path in (executable, stdlib, *seen["libraries"]):
        if Path(path).is_relative_to(stdlib) and path != stdlib:
            continue
        if not system and Path(path).is_relative_to(prefix):
            shown[path] = str(Path(target) / Path(path).relative_to(prefix))
        else:
            folder = path if path in (executable, stdlib) else os.path.dirname(path)
            shown[folder] = folder
    options: list[str] = []
    for name in ("/lib", "/lib64"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            shown[name] = name
    if os.path.isdir("/usr/lib64") and not os.path.islink("/usr/lib64"):
        shown["/usr/lib64"] = "/usr/lib64"
    for source in sorted(shown, key=len):
        options += ["--ro-bind", source, shown[source]]
    return tuple(options + _bare(stdlib, shown[stdlib]) + _surroundings(target)), shown[executable]


def _bare(stdlib: str, inside: str) -> list[str]:
    """Hide installed packages: a program could add their folder to its path, and they are not ours to show."""
    options = []
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(os.path.join(stdlib, name)):
            options += ["--size", "4096", "--tmpfs", f"{inside}/{name}", "--remount-ro", f"{inside}/{name}"]
    return options


def _surroundings(prefix: str) -> list[str]:
    options = []
    for device in _DEVICES:
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    variables = {"HOME": "/tmp", "TMPDIR": "/tmp", "PATH": f"{prefix}/bin", "LANG": "C.UTF-8"}
    if prefix == _INSIDE:
        variables["LD_LIBRARY_PATH"] = f"{_INSIDE}/lib"
    for name, value in variables.items():
        options += ["--setenv", name, value]
    return options
