"""What a sandboxed program may use, and the few lines inside the sandbox that hold it to that."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """Bounds of one run.

    Args:
        seconds: wall time from the program's first line on; the parent holds the clock.
        cpu_seconds: processor time of all threads together; the kernel holds the clock.
        memory_bytes: address space (RLIMIT_AS).
        disk_bytes: size of /tmp, the only folder that can be written to, and the largest file.
        files: in /tmp, folders and links included. No mount option of bwrap's bounds them, so the parent counts them
            every tenth of a second and stops a program that has more; it may have made 20,000 by then.
        output_bytes: of stdout and of stderr; the run ends where one has more.
        open_files: RLIMIT_NOFILE.
        threads: RLIMIT_NPROC; the kernel ignores it for root, hence the change of user in bwrap.py.
        start_seconds: for the sandbox itself to come up; past that the run is `infra`, not the program's fault.

    Raises:
        ValueError: a bound is not positive.
    """

    seconds: float = 10.0
    cpu_seconds: int = 12
    memory_bytes: int = 512 * MIB
    disk_bytes: int = 16 * MIB
    files: int = 4096
    output_bytes: int = MIB
    open_files: int = 64
    threads: int = 64
    start_seconds: float = 30.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Limits({name}={value!r}): a limit is more than 0")


# Runs before the program, in its interpreter. Hard limits cannot be raised again. The byte on the control pipe tells
# the parent that the sandbox stands: what fails before is `infra`, what fails after is the program's own doing.
# `exit` and `quit` are site's, which -S leaves out.
_LAUNCHER = """\
import os, resource, sys
for limit, value in {limits}:
    resource.setrlimit(limit, (value, value))
source = open(int(sys.argv[1]), "rb").read()
control = int(sys.argv[2])
sys.argv[:] = ["program.py"]
__builtins__.exit = __builtins__.quit = sys.exit
os.write(control, b"s")
os.close(control)
del limit, value, control, os, resource, sys
exec(compile(source, "program.py", "exec", 0, True))
"""


def launcher(limits: Limits, count_threads: bool = True) -> str:
    """Python text for `-c`, to be run with two descriptors as arguments.

    Args:
        limits: the bounds.
        count_threads: set RLIMIT_NPROC too; right only where the count is the sandbox's own.

    Returns:
        The text. Its first argument is the descriptor to read the program from, its second the one to write a byte to
        when the program begins.
    """
    values = {
        "CPU": limits.cpu_seconds, "AS": limits.memory_bytes, "FSIZE": limits.disk_bytes, "NOFILE": limits.open_files,
        "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 64,
    }  # fmt: skip
    if count_threads:
        values["NPROC"] = limits.threads
    pairs = ", ".join(f"(resource.RLIMIT_{name}, {int(value)})" for name, value in values.items())
    return _LAUNCHER.replace("{limits}", f"({pairs})")
