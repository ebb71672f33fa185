"""The results of an engine's calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Predictions after the last `keep` fed tokens. All arrays are valid until the engine's next `feed` or `draft`.

    Attributes:
        token_ids: int64[keep], the most likely next token of each position, as full-vocabulary ids.
        read_logits: See `logits`.
        read_features: See `features`; None where the engine gives none.
    """

    token_ids: NDArray[np.int64]
    read_logits: Callable[[], NDArray[np.float32]]
    read_features: Callable[[], NDArray[np.float32]] | None = None

    @property
    def logits(self) -> NDArray[np.float32]:
        """float32[keep, columns]; column `i` of a trimmed drafter is token `Engine.head_tokens.kept_token_ids[i]`.

        Copied from where the engine runs when asked for: greedy decoding never needs them.
        """
        return self.read_logits()

    @property
    def features(self) -> NDArray[np.float32]:
        """float32[fed, features_given]: the hidden states of every position of the call, for a drafter to read."""
        if self.read_features is None:
            raise ValueError("this engine gives no features")
        return self.read_features()

    def copied(self) -> "StepOutput":
        """Returns the predictions in memory of their own, which no later call of the engine overwrites.

        Features are left as they are: an engine that gives some copies them where they are.
        """
        if not len(self.token_ids):
            return self
        logits = self.logits.copy()
        return StepOutput(self.token_ids.copy(), lambda: logits, self.read_features)


def join_outputs(outputs: Sequence[StepOutput]) -> StepOutput:
    """Returns what the calls of one feed give together, one after the other.

    Args:
        outputs: The output of each call, at least one. None but the last may lie where a later call has written.
    """
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    predicting = [output for output in outputs if len(output.token_ids)]
    return StepOutput(
        _concatenated([output.token_ids for output in predicting]),
        lambda: _concatenated([output.logits for output in predicting]),
        last.read_features and (lambda: _concatenated([output.features for output in outputs])),
    )


def _concatenated(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The outcome of a verification.

    Attributes:
        count: The number of drafted tokens that are accepted, from the first on.
        next_token: The target's own token, which follows them.
    """

    count: int
    next_token: int


@dataclass(frozen=True, slots=True)
class Speculation:
    """A draft and its verification, both computed in one piece of work for the device.

    Attributes:
        drafted: int64[γ].
        verified: The output of the target's `feed` for the last token before the draft and all of the draft, with
            keep = γ + 1.
        draft_seconds: The time of drafting, by the device's clock.
        verify_seconds: The time of the verification, by the device's clock.
        accepted: The outcome for a sampled draft; None for a greedy one, whose outcome follows from `verified`.
    """

    drafted: NDArray[np.int64]
    verified: StepOutput
    draft_seconds: float
    verify_seconds: float
    accepted: Accepted | None = None
