"""`Replayed`: GPU work that is the same at every run, launched as one CUDA graph."""

from collections.abc import Callable
from typing import Any

from engines.cuda.runtime import CudaStream


class Replayed:
    """Work that uses the same addresses at every run.

    The first `warm_up` runs launch kernel by kernel, because libraries load and allocate when first used, which a CUDA
    graph cannot hold. The next run captures a graph, if `is_capturable` then returns True, and later runs launch it.

    Args:
        stream: The stream that the work is queued on.
        enqueue: Queues the work; returns False if that failed.
        is_capturable: Returns whether the work can be captured.
        warm_up: The number of runs before the capture.
    """

    def __init__(
        self, stream: CudaStream, enqueue: Callable[[], bool], is_capturable: Callable[[], bool], warm_up: int = 1
    ) -> None:
        self._stream, self._enqueue, self._is_capturable = stream, enqueue, is_capturable
        self._until_capture = warm_up
        self._graph: Any | None = None

    @property
    def has_graph(self) -> bool:
        """Whether `run` launches a CUDA graph."""
        return self._graph is not None

    def run(self) -> bool:
        """Queue the work and do not wait. Returns False where `enqueue` did."""
        if self._until_capture == 0 and self._is_capturable():
            self._graph = self._stream.capture(self._enqueue)
        self._until_capture -= 1
        if self._graph is None:
            return self._enqueue()
        self._stream.launch(self._graph)
        return True

    def close(self) -> None:
        """Free the graph. Calling it again does nothing."""
        if self._graph is not None:
            self._stream.discard(self._graph)
            self._graph = None
