"""Medusa heads on ONNX Runtime's CPU."""

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.base import ContextFull, Engine
from engines.bundle.graph_io import FEATURES_OUTPUT, LOGITS, TOKEN_IDS
from engines.bundle.read import Bundle
from engines.keys_values import KeysValues
from engines.ort.session import numpy_dtype
from engines.outputs import StepOutput


class MedusaEngine(Engine):
    """Medusa heads, which all draft from the target's features alone.

    Head i predicts the token i + 2 places after the one whose features it reads. `feed_features` runs all heads and
    gives what the first one predicts; each `feed` then gives what the next one predicts, whatever token it is fed.
    There is no KV cache: `length` only counts.
    """

    def __init__(self, bundle: Bundle, session: ort.InferenceSession) -> None:
        super().__init__(bundle.manifest, bundle.vocab_map, bundle.tokenizer_file)
        self._bundle, self._session = bundle, session
        self.features_read = bundle.manifest.feature_size
        self._dtype = numpy_dtype(session.get_inputs()[0].type)
        (heads,) = (output.shape[1] for output in session.get_outputs() if output.name == LOGITS)
        self.max_draft = int(heads)
        self._token_ids = np.zeros((self.max_draft, 0), np.int64)  # [heads, kept]
        self._logits = np.zeros((self.max_draft, 0, 0), np.float32)
        self._head, self._at = self.max_draft, 0  # the next head, and the length at which it may follow

    def feed_features(
        self, token_ids: Sequence[int] | NDArray[np.int64], features: NDArray[np.float32], keep: int = 1
    ) -> StepOutput:
        if features.shape != (len(token_ids), self.features_read):
            raise ValueError(f"{len(token_ids)} tokens go with [tokens, {self.features_read}], not {features.shape}")
        self._grow(len(token_ids))
        rows = features[-keep:].astype(self._dtype, copy=False)
        logits, drafted = self._session.run([LOGITS, TOKEN_IDS], {FEATURES_OUTPUT: rows[None]})
        self._logits, self._token_ids, self._head = logits[0], drafted[0], 0
        return self._next()

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:  # noqa: ARG002
        if len(token_ids) != 1 or self.length != self._at or self._head == self.max_draft:
            raise ValueError("without features, Medusa heads follow one another, a token each")
        self._grow(1)
        self._logits, self._token_ids = self._logits[:, -1:], self._token_ids[:, -1:]
        return self._next()

    def fork(self, share_cache_with: Engine | None = None) -> Engine:  # noqa: ARG002  (there is none)
        return MedusaEngine(self._bundle, self._session)

    def snapshot(self) -> KeysValues:
        return KeysValues(self.length, {})

    def restore(self, copied: KeysValues, length: int) -> None:  # noqa: ARG002
        self.rewind(0)
        self.length = length

    def environment(self) -> dict[str, str]:
        return {"onnxruntime": ort.__version__}

    def _release(self) -> None:
        if hasattr(self, "_session"):
            del self._session

    def _grow(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise ContextFull(f"{self.length} + {tokens} tokens, the bundle is for {self.capacity}")
        self.length += tokens

    def _next(self) -> StepOutput:
        logits, token_ids = self._logits[self._head], self._token_ids[self._head]
        self._head, self._at = self._head + 1, self.length
        return StepOutput(token_ids, lambda: logits.astype(np.float32, copy=False))
