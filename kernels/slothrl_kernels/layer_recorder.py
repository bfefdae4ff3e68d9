"""Recording a callable once and running it again: as a CUDA graph, or by calling it anew where there are none."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """What can record. nbytes: device memory that its recordings hold."""

    nbytes: int

    def ready(self) -> bool:
        """Whether recordings may be made and run now."""
        ...

    def record(self, call: Callable[[], None]) -> Replay:
        """Run `call`, and return what does the same to the same memory again."""
        ...


class Rerun:
    """No recording: the callable itself. For devices without graphs, and for the tests of all that is around them."""

    nbytes = 0

    def ready(self) -> bool:
        return True

    def record(self, call: Callable[[], None]) -> Replay:
        call()
        return call


class CudaGraphs:
    """CUDA graphs in one pool of memory that is nobody else's, on the stream that was current when this was made.

    Nothing allocated in a recording may outlive it, so every recording uses the same memory again: the pool is as large
    as the largest of them needs. vLLM's threads and its own graphs are not disturbed: the capture minds this thread only.

    Raises (by `record`): whatever the callable raises, and RuntimeError where it does something that no graph can hold;
        the stream is as usable as before then.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._stream = torch.cuda.current_stream()
        self._capture = torch.cuda.Stream(self._stream.device)
        self._pool = torch.cuda.graph_pool_handle()

    def ready(self) -> bool:
        return torch.cuda.current_stream() == self._stream and not torch.cuda.is_current_stream_capturing()

    def record(self, call: Callable[[], None]) -> Replay:
        call()  # compiles and loads kernels, fills the caches of cuBLAS and of Python: none of that can be captured
        torch.cuda.synchronize(self._stream.device)
        before, graph = torch.cuda.memory_reserved(self._stream.device), torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.stream(self._capture):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            except BaseException:
                _abandon(graph)
                raise
            graph.capture_end()
        self.nbytes += max(0, torch.cuda.memory_reserved(self._stream.device) - before)
        return graph.replay


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that failed; the stream is in capture until somebody does."""
    try:
        graph.capture_end()
    except RuntimeError:  # says again that it failed
        return


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's cycles wait: what they free, an older graph for one, may not be freed during a capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
