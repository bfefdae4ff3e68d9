"""SIGINT (Ctrl-C) and SIGTERM (a scheduler): the run stops after its step, saved; a second one stops it at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):  # noqa: N818 - it is no error, and `except Exception` must not stop it
    """A signal ended the run at once. Attribute `number`: the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Handles both signals inside a `with`; outside the main thread (a notebook's executor) it leaves them alone.

    Attributes:
        number: the signal that asked for the end of training; 0: none.
        training: whether there is a step to finish; where there is none a signal stops at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number or not self.training:
            raise Stopped(number)
        self.number = number
        print("\nstopping after this step (once more to stop at once)", flush=True)


def exit_code(number: int) -> int:
    """What a shell gives for a process that signal `number` ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number
