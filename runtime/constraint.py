"""`Constraint`: which tokens may come next. `Masks`: what a constraint allows after a text and any draft of it."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.logit_rules import FORBIDDEN, Columns, LogitRules


class Constraint(Protocol):
    """The set of tokens that may come next: a state that follows the tokens of one generation.

    An EOS is allowed exactly where the output may end; where it must end, nothing else is allowed.
    """

    def allowed(self) -> NDArray[np.bool_]:
        """Returns whether each token may come next, as a new bool[vocab_size].

        Raises:
            VocabtrimError: The constraint cannot tell within its limits.
        """

    def advance(self, token: int) -> None:
        """Go on behind `token`, which is allowed or follows an EOS."""

    def rewind(self, count: int) -> None:
        """Go back before the last `count` tokens."""

    def fitting(self, tokens: Sequence[int]) -> int:
        """Returns how many of the first of `tokens` may follow one after another; the state stays as it is."""


class Masks:
    """The masks of a constraint after the text and each beginning of a draft.

    A round drafts and verifies after the same tokens, so each mask is computed once, for drafter and target alike.
    """

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._draft: list[int] = []  # the tokens behind the text that the constraint has read
        self._masks: list[NDArray[np.bool_]] = []  # after the text and the first i of them
        self._last: list[NDArray[np.bool_]] = []  # those that the last tokens of the text were chosen by

    def after(self, draft: Sequence[int]) -> NDArray[np.bool_]:
        """Returns bool[vocab_size]: which tokens may follow the text and `draft`, whose tokens are allowed."""
        self._read(draft)
        if len(self._masks) == len(draft):
            self._masks.append(self._constraint.allowed())
        return self._masks[len(draft)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what was generated to the text."""
        self._read(tokens)
        self._last = self._masks[: len(tokens)]
        self._draft, self._masks = [], self._masks[len(tokens) :]

    def fitting(self, tokens: Sequence[int]) -> int:
        """Returns how many of the first of `tokens` may follow the text."""
        self._read([])
        return self._constraint.fitting(tokens)

    def of_last_tokens(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the rows of logits that the last tokens of the text were chosen by, masked.

        Args:
            logits: float32[n or more, vocab_size]; row i comes before the i-th of the n tokens last added to the text.
        """
        return np.where(np.stack(self._last), logits[: len(self._last)], FORBIDDEN)

    def _read(self, draft: Sequence[int]) -> None:
        """Let the constraint's state be that after the text and `draft`."""
        same = next((i for i, (a, b) in enumerate(zip(self._draft, draft, strict=False)) if a != b), None)
        same = min(len(self._draft), len(draft)) if same is None else same
        self._constraint.rewind(len(self._draft) - same)
        del self._draft[same:], self._masks[same + 1 :]
        for token in draft[same:]:
            self._constraint.advance(token)
            self._draft.append(token)


class ConstrainedRules:
    """Forbids what a constraint does not allow, before every other rule."""

    def __init__(self, masks: Masks, rules: LogitRules | None) -> None:
        self._masks, self._rules = masks, rules

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what was generated to the text."""
        self._masks.extend(tokens)
        if self._rules:
            self._rules.extend(tokens)

    def apply(self, row: NDArray[np.float32], draft: Sequence[int], columns: Columns) -> NDArray[np.float32]:
        """Returns the logits after the text and `draft` as the constraint and the rules leave them.

        See `LogitRules.apply`.
        """
        masked = np.where(columns.spread(self._masks.after(draft)), row, FORBIDDEN)
        return self._rules.apply(masked, draft, columns) if self._rules else masked
