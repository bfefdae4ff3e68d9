"""Recording a callable once and running it again: as a CUDA graph, or by calling it anew where there are none."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """What can record. nbytes: device memory that its recordings hold."""

    nbytes: int

    def ready(self) -> bool:
        """Whether recordings may be made and run now."""
        ...

    def begin(self) -> None:
        """Called before the first of several recordings."""
        ...

    def record(self, call: Callable[[], None]) -> Replay:
        """Run `call`, and return what does the same to the same memory again."""
        ...

    def end(self) -> None:
        """Called when no recording is about to follow."""
        ...

    def close(self) -> None:
        """Called when no recording is used any more."""
        ...


class Rerun:
    """No recording: the callable itself. For devices without graphs, and for the tests of all that is around them."""

    nbytes = 0

    def ready(self) -> bool:
        return True

    def begin(self) -> None:
        return

    def record(self, call: Callable[[], None]) -> Replay:
        call()
        return call

    def end(self) -> None:
        return

    def close(self) -> None:
        return


class CudaGraphs:
    """CUDA graphs in one pool of memory that is nobody else's, on the stream that was current when this was made.

    Nothing allocated in a recording may outlive it, so every recording uses the same memory again: the pool is as large
    as the largest of them needs. vLLM's threads and its graphs are not disturbed: a capture minds its own thread alone.

    Raises (by `record`): whatever the callable raises, and RuntimeError where it does something that no graph can hold;
        the stream is as usable as before then.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._stream = torch.cuda.current_stream()
        self._capture = torch.cuda.Stream(self._stream.device)
        self._pool: Any = None
        self._anchor: Replay | None = None  # torch does not take a pool again whose last graph is gone

    def ready(self) -> bool:
        return torch.cuda.current_stream() == self._stream and not torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        torch.cuda.empty_cache()  # in a capture torch cannot give back what it only caches
        if self._anchor is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._anchor = self.record(self._nothing)

    def record(self, call: Callable[[], None]) -> Replay:
        call()  # compiles and loads kernels, fills the caches of cuBLAS and of Python: none of that can be captured
        torch.cuda.synchronize(self._stream.device)
        before, graph = torch.cuda.memory_reserved(self._stream.device), torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.stream(self._capture):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            except BaseException:
                self._abandon(graph)
                raise
            self._end(graph)
        self.nbytes += max(0, torch.cuda.memory_reserved(self._stream.device) - before)
        return graph.replay

    def end(self) -> None:
        torch.cuda.empty_cache()  # what layers took before they were recorded, the driver has again

    def _nothing(self) -> None:
        torch.zeros(1, device=self._stream.device)

    def close(self) -> None:
        self._anchor, self._pool, self.nbytes = None, None, 0

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._forget_capture()
            raise

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed: the stream is in it until somebody does."""
        with suppress(RuntimeError):  # says again that it failed
            graph.capture_end()
            return
        self._forget_capture()

    def _forget_capture(self) -> None:
        """torch's allocator and its random generator believe in a capture until they are told of its end.

        The one would keep what other streams free, the other would refuse numbers outside of a capture; a capture that
        succeeds tells the generator.
        """
        for tell in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):  # it knows
                tell(self._stream.device_index, self._pool)
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError), torch.cuda.stream(self._capture):
            graph.capture_begin(capture_error_mode="thread_local")
            self._nothing()
            graph.capture_end()


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
