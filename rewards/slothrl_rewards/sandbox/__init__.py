"""Run code that nobody has looked at: one bubblewrap sandbox a program, closed by default.

`run_python(program, stdin, limits)` is the whole of it; the verdict about what the program printed is made outside.
"""

from .bwrap import SandboxUnavailable
from .limits import Limits
from .process import Outcome
from .run import run_python, self_test

__all__ = ["Limits", "Outcome", "SandboxUnavailable", "run_python", "self_test"]
