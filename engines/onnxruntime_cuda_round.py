"""`CudaRound`: γ draft steps and their verification as one piece of work for the device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.base import Speculation, StepOutput
from engines.onnxruntime_cuda_run import CudaRun, Place

if TYPE_CHECKING:
    from engines.onnxruntime_cuda import OnnxRuntimeCudaEngine


class CudaRound:
    """Each draft step reads its token where the step before wrote it, and the verification reads all of them there.

    One copy brings what the host knows beforehand, one brings all token ids back. On the device, int64 each:
    seqlens_k of the γ draft steps and of the verification, in the low half of each value | position_ids of the
    `unread` tokens and of the γ drafted ones | the `unread` tokens | the γ drafted ones | the γ + 1 verified ones.
    """

    def __init__(
        self, target: "OnnxRuntimeCudaEngine", drafter: "OnnxRuntimeCudaEngine", unread: int, draft_length: int
    ) -> None:
        self._unread, self._draft_length = unread, draft_length
        self._stream = target.stream
        positions = draft_length + 1
        self._tokens = positions + unread + draft_length
        self._drafted = self._tokens + unread
        self._host = target.stream.pinned(self._drafted + 2 * draft_length + 1)
        self._device = target.allocate((len(self._host),), np.int64)
        self._events = [target.stream.event() for _ in range(3)]

        def run(engine: "OnnxRuntimeCudaEngine", step: int, first: int, count: int, keep: int, written: int) -> CudaRun:
            """first: of the tokens read, counted from the first unread one."""
            places = {
                "seqlens_k": self._place(step, np.int32, (1,)),
                "position_ids": self._place(positions + first, np.int64, (1, count)),
                "input_ids": self._place(self._tokens + first, np.int64, (1, count)),
            }
            return engine.bind_run(places, self._place(written, np.int64, (1, keep)))

        self._draft = [run(drafter, 0, 0, unread, 1, self._drafted)]
        for i in range(1, draft_length):
            self._draft.append(run(drafter, i, unread + i - 1, 1, 1, self._drafted + i))
        verified = self._drafted + draft_length
        self._verify = run(target, draft_length, unread - 1, draft_length + 1, draft_length + 1, verified)
        self._work = target.replayed(self._enqueue, (drafter,))

    @property
    def has_graph(self) -> bool:
        """Whether `run` launches a CUDA graph."""
        return self._work.has_graph

    def run(self, token_ids: Sequence[int] | NDArray[np.int64], length: int) -> Speculation:
        """token_ids: the `unread` tokens. length: of the target's cache, which lacks only the last of them."""
        first = length - self._unread + 1  # position of the first unread token
        steps, tokens, drafted = self._draft_length + 1, self._tokens, self._drafted
        self._host[:steps] = np.arange(length, length + steps)
        self._host[steps:tokens] = np.arange(first, length + steps)
        self._host[tokens:drafted] = token_ids
        self._work.run()
        self._stream.synchronize()
        found = self._host[drafted:].copy()
        draft_seconds, verify_seconds = (self._stream.seconds_between(*self._events[i : i + 2]) for i in range(2))
        verified = StepOutput(found[self._draft_length :], self._verify.read_logits)
        return Speculation(found[: self._draft_length], verified, draft_seconds, verify_seconds)

    def close(self) -> None:
        """Free the graph and the events, once."""
        self._work.close()
        for event in self._events:
            self._stream.discard_event(event)
        self._events.clear()

    def _enqueue(self) -> None:
        host, device, stream = self._host.ctypes.data, self._device.data_ptr(), self._stream
        stream.copy(device, host, 8 * self._drafted)
        stream.record(self._events[0])
        for step in self._draft:
            step.enqueue()
        stream.record(self._events[1])
        self._verify.enqueue()
        stream.record(self._events[2])
        stream.copy(host + 8 * self._drafted, device + 8 * self._drafted, 8 * (len(self._host) - self._drafted))

    def _place(self, index: int, dtype: type[np.generic], shape: tuple[int, ...]) -> Place:
        """At the int64 value `index` on the device."""
        return Place(dtype, shape, self._device.data_ptr() + 8 * index)
