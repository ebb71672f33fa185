"""Engines on ONNX Runtime's CUDA with hidden states: a target that gives features, an EAGLE head that reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.base import MAX_KEEP, Engine
from engines.bundle.graph_io import FEATURES_OUTPUT, HIDDEN_INPUT, HIDDEN_OUTPUT, INPUT_IDS
from engines.bundle.read import Bundle
from engines.ort.calls import Call
from engines.ort.eagle import require_last_row, require_rows
from engines.ort.step import Step
from engines.ort_cuda.binding import BoundModel, BoundSession, Place, Work, run_options
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.ort_cuda.gpu import Gpu
from engines.ort_cuda.provider import can_be_captured
from engines.ort_cuda.rows import DeviceRows, RowCopy, allocate_rows
from engines.outputs import Speculation, StepOutput
from engines.sampling_params import Sampling


class CudaFeatureEngine(OnnxRuntimeCudaEngine):
    """A target that keeps the features of its last call on the device, in the first rows of `features`.

    They are copied to the host only when `StepOutput.features` is read.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: ort.InferenceSession,
        gpu: Gpu,
        shared: OnnxRuntimeCudaEngine | None = None,
    ) -> None:
        super().__init__(bundle, session, gpu, shared)
        self.features = self._rows(MAX_KEEP)
        self._given_from = 0  # number of the token in the first row

    def speculate(
        self,
        drafter: Engine,
        token_ids: Sequence[int] | NDArray[np.int64],
        draft_length: int,
        sampling: Sampling | None = None,
    ) -> Speculation | None:
        start = self.length
        if draft_length >= MAX_KEEP:  # more rows than there are
            return None
        speculation = super().speculate(drafter, token_ids, draft_length, sampling)
        if speculation is None:
            return None
        self._given_from = start
        if isinstance(drafter, CudaEagleEngine):
            drafter.last = len(token_ids) + draft_length - 2, drafter.length
        verified = replace(speculation.verified, read_features=lambda: self.features.read(draft_length + 1))
        return replace(speculation, verified=verified)

    def has_given(self, first: int, count: int) -> bool:
        """Returns whether `features` starts at token number `first`, and the cache ends `count` tokens after it."""
        return self._given_from == first and first + count == self.length

    def bind_model(self, places: Mapping[str, Place], token_ids: Place) -> BoundModel:
        run = super().bind_model(places, token_ids)
        rows = self.features.place(0, places[INPUT_IDS].shape[-1])
        self.gpu.bind_output(run.binding, FEATURES_OUTPUT, rows)
        return run

    def _execute(self, step: Step, call: Call) -> StepOutput:
        self._given_from = self.length
        output, count = super()._execute(step, call), len(call.ids)
        rows = self.features
        if not call.is_last:  # the next call's rows take the same place
            rows = self._rows(count)
            rows.take(self.features, 0, count)
        return replace(output, read_features=lambda: rows.read(count))

    def _rows(self, count: int) -> DeviceRows:
        return allocate_rows(self, self._session, FEATURES_OUTPUT, count)


class CudaEagleEngine(OnnxRuntimeCudaEngine):
    """A head on the device; `EagleEngine` is the same on the CPU.

    Attributes:
        last: The row of `next_hidden` that was computed last, and the length of the cache after it.
    """

    lag = 1

    def __init__(
        self,
        bundle: Bundle,
        session: ort.InferenceSession,
        fuse: ort.InferenceSession | None,
        gpu: Gpu,
    ) -> None:
        self._fuse = fuse
        super().__init__(bundle, session, gpu)
        self.features_read = bundle.manifest.feature_size
        self._hidden_rows = allocate_rows(self, session, HIDDEN_INPUT, MAX_KEEP)
        self._features = self._hidden_rows  # of a target that is not on the device
        if fuse:
            self._features = allocate_rows(self, fuse, FEATURES_OUTPUT, MAX_KEEP)
        self._made = allocate_rows(
            self, session, HIDDEN_OUTPUT, 2 * MAX_KEEP
        )  # a round: of unread tokens and of drafts
        self.last = 0, 0

    @property
    def is_capturable(self) -> bool:
        return super().is_capturable and (self._fuse is None or can_be_captured(self._fuse))

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        require_last_row(self, token_ids, self.last[1])
        return super().feed(token_ids, keep)

    def feed_features(
        self, token_ids: Sequence[int] | NDArray[np.int64], features: NDArray[np.float32], keep: int = 1
    ) -> StepOutput:
        require_rows(self, token_ids, features)
        return self._feed(token_ids, keep, features)

    def knows(self, target: OnnxRuntimeCudaEngine, unread: int) -> bool:
        if not isinstance(target, CudaFeatureEngine) or not target.has_given(self.length, unread):
            return False
        given, read = target.features, self._features
        return (given.onnx_type, given.size) == (read.onnx_type, read.size)

    def catch_up(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Sequence[int] | NDArray[np.int64]:
        """Returns all tokens: a head cannot read them without features."""
        return token_ids

    def prepare(self, target: OnnxRuntimeCudaEngine, unread: int) -> list[Work]:
        assert isinstance(target, CudaFeatureEngine)
        if self._fuse is None:
            return [RowCopy(target.features, self._hidden_rows, unread)]
        return [self._bind_fuse(self._fuse, target.features.place(0, unread), unread)]

    def beside_tokens(self, step: int, unread: int) -> dict[str, Place]:
        if step == 0:
            return self._fused_places(unread)
        at = unread + step - 1  # the row after the one before
        return {HIDDEN_INPUT: self._made.place(at - 1, 1), HIDDEN_OUTPUT: self._made.place(at, 1)}

    def _bind_fuse(self, fuse: ort.InferenceSession, features: Place, count: int) -> BoundSession:
        """Bind the graph that makes the hidden states of `count` rows from `features`, [1, count, features_read]."""
        binding = fuse.io_binding()
        self.gpu.bind_input(binding, FEATURES_OUTPUT, features)
        self.gpu.bind_output(binding, HIDDEN_INPUT, self._hidden_rows.place(0, count))
        return BoundSession(fuse, binding, run_options())

    def bind_model(self, places: Mapping[str, Place], token_ids: Place) -> BoundModel:
        run = super().bind_model(places, token_ids)
        hidden = {**self._fused_places(places[INPUT_IDS].shape[-1]), **places}
        self.gpu.bind_input(run.binding, HIDDEN_INPUT, hidden[HIDDEN_INPUT])
        self.gpu.bind_output(run.binding, HIDDEN_OUTPUT, hidden[HIDDEN_OUTPUT])
        return run

    def _release(self) -> None:
        super()._release()
        if hasattr(self, "_fuse"):
            del self._fuse

    def _execute(self, step: Step, call: Call) -> StepOutput:
        count = len(call.ids)
        if call.features is None:
            self._hidden_rows.take(self._made, self.last[0], 1)
        else:
            self._features.write(call.features)
            if self._fuse:
                self._bind_fuse(self._fuse, self._features.place(0, count), count).enqueue()
        output = super()._execute(step, call)
        self.last = count - 1, self.length
        return output

    def _fused_places(self, count: int) -> dict[str, Place]:
        return {HIDDEN_INPUT: self._hidden_rows.place(0, count), HIDDEN_OUTPUT: self._made.place(0, count)}
