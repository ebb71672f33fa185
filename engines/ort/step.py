"""`Step`: one input length of an engine, with its buffers bound once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle.graph_io import FEATURES_OUTPUT
from engines.errors import VocabtrimError


@dataclass(frozen=True, slots=True)
class Step(ABC):
    """One input length with its buffers: written by `feed`, read by the session, never allocated again.

    Attributes:
        session: The session that runs.
        binding: The buffers, bound to its inputs and outputs.
        input_ids: int64[1, rows]; as many rows as are computed: the length, or one more.
        position_ids: int64[1, rows].
        seqlens_k: int32[1], the tokens in the cache after the step, less one.
        token_ids: int64[1, keep], the tokens that `run` predicts after the last `keep` of the length.
    """

    session: ort.InferenceSession
    binding: ort.IOBinding
    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    seqlens_k: NDArray[np.int32]
    token_ids: NDArray[np.int64]

    @property
    def written(self) -> int:
        """The tokens that a run writes to the cache, those of padding included."""
        return int(self.input_ids.shape[1])

    @abstractmethod
    def run(self, end: int) -> None:
        """Compute with what the arrays hold, and wait for `token_ids`.

        Args:
            end: The tokens in the cache afterwards.
        """

    @abstractmethod
    def read_logits(self) -> NDArray[np.float32]:
        """Returns float32[keep, head_rows], the logits of the last `run`."""

    def features_reader(self, copied: bool) -> Callable[[], NDArray[np.float32]] | None:  # noqa: ARG002
        """Returns what reads the features of the last `run`, see `StepOutput`; None where the graph gives none.

        Args:
            copied: They must outlive the next `run`.
        """
        return None


@dataclass(frozen=True, slots=True)
class HostStep(Step):
    """A step on the host, whose arrays the session works on. They have no padding rows.

    Attributes:
        total: int32[1], the tokens in the cache after the step; all steps of an engine share it.
        logits: [1, keep, head_rows], in the bundle's dtype.
        hidden: Features and hidden states by the graph's names, [1, length, size] each, in the bundle's dtype.
        attention_padding: Rows that attention alone computes in addition.
    """

    total: NDArray[np.int32]
    logits: NDArray[Any]
    hidden: Mapping[str, NDArray[Any]]
    attention_padding: int = 0

    @property
    def written(self) -> int:
        return int(self.input_ids.shape[1]) + self.attention_padding

    def without_padding(self, length: int, keep: int) -> "HostStep":
        """Returns this step with views of the rows of `length` tokens, the last `keep` of which are predicted after."""
        last = self.token_ids.shape[1] - (self.input_ids.shape[1] - length)
        asked = slice(last - keep, last)
        hidden = {name: array[:, :length] for name, array in self.hidden.items()}
        return replace(self, token_ids=self.token_ids[:, asked], logits=self.logits[:, asked], hidden=hidden)

    def run(self, end: int) -> None:
        self.total[0] = end
        self.session.run_with_iobinding(self.binding)

    def check_chosen(self) -> None:
        """Check the logits of `token_ids`, which are rows of the head. Raises `VocabtrimError` for NaN and infinity."""
        chosen = self.logits[0, np.arange(self.token_ids.shape[1]), self.token_ids[0]]
        if not np.isfinite(chosen).all():
            raise VocabtrimError(
                f"the model's logits are {chosen[~np.isfinite(chosen)][0]}: its numbers are beyond what "
                f"{chosen.dtype} holds; export it with --dtype fp32"
            )

    def read_logits(self) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.logits[0].astype(np.float32, copy=False)
        return logits

    def features_reader(self, copied: bool) -> Callable[[], NDArray[np.float32]] | None:
        if FEATURES_OUTPUT not in self.hidden:
            return None
        rows = self.hidden[FEATURES_OUTPUT][0]
        if copied:
            rows = rows.copy()
        return lambda: rows.astype(np.float32, copy=False)
