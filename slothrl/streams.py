"""Which CUDA stream works for whom: vLLM's own, and the one everything else is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnStream:
    """Runs vLLM on the stream that it chose at its start, and everything else on the stream from before.

    vLLM leaves the thread that starts it on a stream of its own. bitsandbytes quantises, and steps its 8-bit
    optimizers, on the default stream whatever the current one is; the trainer stays on that one, so that its kernels
    and bitsandbytes' are in order. At each crossing the device is synchronised. On a CPU nothing happens.

    Create it before vLLM starts and call `started` after.
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.outside = torch.cuda.current_stream() if self.cuda else None
        self.inside = self.outside

    def started(self) -> None:
        if self.cuda:
            self.inside = torch.cuda.current_stream()
            self._cross(self.outside)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        caller = torch.cuda.current_stream()
        self._cross(self.inside)
        try:
            yield
        finally:
            self._cross(caller)

    @staticmethod
    def _cross(stream) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_stream(stream)
