"""`EagleRound`: a round in which an EAGLE head drafts, from features that never leave the device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.base import Speculation, StepOutput
from engines.onnxruntime_cuda_run import Place
from engines.onnxruntime_cuda_trip import RoundTrip

if TYPE_CHECKING:
    from engines.onnxruntime_cuda_eagle import CudaEagleEngine, CudaFeatureEngine


class EagleRound:
    """The features of the `unread` tokens are fused, the head catches up on them and drafts, the target verifies.

    The features are the first rows of what the target gave last. A draft step reads the token and the hidden state that
    the step before wrote. The values of the trip: seqlens_k of the γ steps of the head and of the verification |
    position_ids from the first unread row's to the last verified token's | the `unread` tokens | the γ drafted ones |
    the γ + 1 verified ones. A token's position in the head's cache is one less than in the target's.
    """

    def __init__(self, target: "CudaFeatureEngine", head: "CudaEagleEngine", unread: int, draft_length: int) -> None:
        self._unread, self._draft_length = unread, draft_length
        self._positions = draft_length + 1
        self._tokens = self._positions + unread + draft_length + 1
        self._drafted = self._tokens + unread
        self._trip = RoundTrip(target, head, self._drafted, 2 * draft_length + 1)
        places = self._reads(0, 0, 0, unread) | head.hidden_places(unread, None)
        draft = [head.bind_run(places, self._written(self._drafted, 1))]
        for i in range(1, draft_length):
            at = unread + i - 1
            places = self._reads(i, at, at, 1) | head.hidden_places(1, at - 1)
            draft.append(head.bind_run(places, self._written(self._drafted + i, 1)))
        kept = draft_length + 1
        places = self._reads(draft_length, unread, unread - 1, kept)
        self._verify = target.bind_run(places, self._written(self._drafted + draft_length, kept))
        fuse = head.fusing(target.features.place(0, unread), unread)
        self._trip.plan([fuse, *(step.enqueue for step in draft)], [self._verify.enqueue])

    @property
    def has_graph(self) -> bool:
        """Whether `run` launches a CUDA graph."""
        return self._trip.has_graph

    def run(self, token_ids: Sequence[int] | NDArray[np.int64], length: int) -> Speculation:
        """token_ids: the `unread` tokens. length: of the target's cache, which lacks only the last of them."""
        values, steps = self._trip.values, self._draft_length
        values[:steps] = np.arange(length - 1, length + steps - 1)
        values[steps] = length + steps
        values[self._positions : self._tokens] = np.arange(length - self._unread, length + steps + 1)
        values[self._tokens : self._drafted] = token_ids
        draft_seconds, verify_seconds = self._trip.run()
        found = values[self._drafted :].copy()
        verified = StepOutput(found[steps:], self._verify.read_logits)
        return Speculation(found[:steps], verified, draft_seconds, verify_seconds)

    def close(self) -> None:
        """Free the graph and the events. Calling it again does nothing."""
        self._trip.close()

    def _reads(self, step: int, position: int, token: int, count: int) -> dict[str, Place]:
        """position, token: numbers of the first ones read, counted from the first unread row's."""
        return {
            "seqlens_k": self._trip.place(step, np.int32, (1,)),
            "position_ids": self._trip.place(self._positions + position, np.int64, (1, count)),
            "input_ids": self._trip.place(self._tokens + token, np.int64, (1, count)),
        }

    def _written(self, value: int, count: int) -> Place:
        return self._trip.place(value, np.int64, (1, count))
