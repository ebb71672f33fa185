"""`Replayed`: work for a GPU that is the same every time, run as one CUDA graph."""

from collections.abc import Callable
from typing import Any

from engines.cuda.runtime import CudaStream


class Replayed:
    """Work that `enqueue` puts on `stream`, at the same addresses every time.

    The first `warm_up` runs launch kernel by kernel, because libraries load and allocate when first used, which no
    graph can hold. The next run captures a CUDA graph, if `is_capturable` then allows it, and later runs launch that.
    `enqueue` returns False where it failed.
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
