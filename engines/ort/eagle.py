"""Heads on ONNX Runtime's CPU that read their target's hidden states and have a KV cache."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.graph_io import FEATURES_OUTPUT, HIDDEN_INPUT, HIDDEN_OUTPUT
from engines.bundle.read import Bundle
from engines.ort.calls import Call
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.step import HostStep, Step
from engines.outputs import StepOutput


class EagleEngine(OnnxRuntimeEngine):
    """An EAGLE head or a multi-token-prediction layer.

    Row t of its cache is made of the features of token t and the embedding of token t + 1. `feed` goes on from the
    hidden state that the last row left: draft steps read no features.

    Args:
        bundle: The bundle.
        session: A session on the head's decoder.
        fuse: A session on the graph that makes hidden states of features; None if features are hidden states already.
    """

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, fuse: ort.InferenceSession | None) -> None:
        super().__init__(bundle, session)
        self.features_read = bundle.manifest.feature_size
        self._fuse = fuse
        size, dtype = self._hidden[HIDDEN_INPUT]
        self._last, self._last_at = np.zeros((1, size), dtype), 0  # of the row before number `_last_at`

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        require_last_row(self, token_ids, self._last_at)
        return super().feed(token_ids, keep)

    def feed_features(
        self, token_ids: Sequence[int] | NDArray[np.int64], features: NDArray[np.float32], keep: int = 1
    ) -> StepOutput:
        require_rows(self, token_ids, features)
        return self._feed(token_ids, keep, features)

    def fork(self, share_cache_with: Engine | None = None) -> Engine:  # noqa: ARG002  (it shares with nobody)
        return EagleEngine(self._bundle, self._session, self._fuse)

    def _release(self) -> None:
        super()._release()
        self._fuse = None

    def _execute(self, step: Step, call: Call) -> StepOutput:
        assert isinstance(step, HostStep)
        step.hidden[HIDDEN_INPUT][0] = self._last if call.features is None else self._hidden_of(call.features)
        output = super()._execute(step, call)
        self._last, self._last_at = step.hidden[HIDDEN_OUTPUT][0, -1:].copy(), self.length
        return output

    def _hidden_of(self, features: NDArray[np.float32]) -> NDArray[Any]:
        """Returns the hidden states, [n, size], that go in with tokens of these features, [n, features_read]."""
        rows = features.astype(self._last.dtype, copy=False)
        if self._fuse is None:
            return rows
        hidden: NDArray[Any] = self._fuse.run([HIDDEN_INPUT], {FEATURES_OUTPUT: rows[None]})[0][0]
        return hidden


def require_last_row(head: Engine, token_ids: Sequence[int] | NDArray[np.int64], last_at: int) -> None:
    """Check that `head` can go on without features.

    Args:
        head: The head.
        token_ids: int64[n], the tokens to feed.
        last_at: The head's length after the row that it computed last.

    Raises:
        ValueError: More than one token is fed, or that row is not the last one any more.
    """
    if len(token_ids) != 1 or not head.length == last_at > 0:
        raise ValueError("without features, a head goes on by one token from the row that it computed last")


def require_rows(head: Engine, token_ids: Sequence[int] | NDArray[np.int64], features: NDArray[np.float32]) -> None:
    """Check that there is a row of features for each token.

    Raises:
        ValueError: `features` is not [tokens, features_read].
    """
    if features.shape != (len(token_ids), head.features_read):
        raise ValueError(f"{len(token_ids)} tokens go with [tokens, {head.features_read}], not {features.shape}")
