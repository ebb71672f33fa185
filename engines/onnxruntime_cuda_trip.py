"""`RoundTrip`: numbers to the device, runs that use them there, and numbers back, with one wait."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engines.onnxruntime_cuda_run import Place

if TYPE_CHECKING:
    from engines.onnxruntime_cuda import OnnxRuntimeCudaEngine


class RoundTrip:
    """A CUDA graph of two engines around int64 values that lie on the host as on the device.

    values: on the host. The first `sent` of them go to the device, in one copy; the `received` after them come back, in
    another. The runs in between are bound to `place`s of them and set once, by `plan`.
    """

    def __init__(
        self, target: "OnnxRuntimeCudaEngine", drafter: "OnnxRuntimeCudaEngine", sent: int, received: int
    ) -> None:
        self._stream, self._sent, self._received = target.stream, sent, received
        self.values = self._stream.pinned(sent + received)
        self._device = target.allocate((sent + received,), np.int64)
        self._phases: Sequence[Sequence[Callable[[], None]]] = ()
        self._events = [self._stream.event()]
        self._work = target.replayed(self._enqueue, (drafter,))

    def place(self, index: int, dtype: type[np.generic], shape: tuple[int, ...]) -> Place:
        """At value `index` on the device; of an int32 its low half."""
        return Place(dtype, shape, self._device.data_ptr() + 8 * index)

    def plan(self, *phases: Sequence[Callable[[], None]]) -> None:
        """phases: each puts its runs on the stream, in this order, and is timed."""
        self._phases = phases
        self._events += [self._stream.event() for _ in phases]

    @property
    def has_graph(self) -> bool:
        """Whether `run` launches a CUDA graph."""
        return self._work.has_graph

    def run(self) -> list[float]:
        """Go there and back, and wait: the seconds that each phase took, by the device's clock."""
        self._work.run()
        self._stream.synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [self._stream.seconds_between(first, second) for first, second in pairs]

    def close(self) -> None:
        """Free the graph and the events. Calling it again does nothing."""
        self._work.close()
        for event in self._events:
            self._stream.discard_event(event)
        self._events.clear()

    def _enqueue(self) -> None:
        here, there = self.values.ctypes.data, self._device.data_ptr()
        self._stream.copy(there, here, 8 * self._sent)
        self._stream.record(self._events[0])
        for runs, event in zip(self._phases, self._events[1:], strict=True):
            for enqueue in runs:
                enqueue()
            self._stream.record(event)
        self._stream.copy(here + 8 * self._sent, there + 8 * self._sent, 8 * self._received)
