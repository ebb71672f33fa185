"""The tokens that a drafter would propose along the target's own text, if its head kept only some of the tokens.

As long as all drafted tokens are accepted, the drafter has read the target's text, and after the first wrong one a
round ends. So one forward pass of the full drafter over that text tells which drafted tokens are right, for every K and
every number of slots.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NEVER_KEPT = np.iinfo(np.int64).max  # the place of a token that no head keeps and no slot takes
MOST_ABOVE = 64  # tokens that the drafter prefers to the right one; with more, some trim keeps one of them for certain


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the target's continuation.

    Attributes:
        domain: The domain that the prompt comes from: a name that the user gave, or a file.
        prompt: The prompt's token ids.
        tokens: int64[n], the target's tokens.
        above: For each of them the token ids, int64[·], that the full drafter prefers to it at its place; None where
            they are more than `MOST_ABOVE`.
    """

    domain: str
    prompt: Sequence[int] = field(repr=False)
    tokens: NDArray[np.int64] = field(repr=False)
    above: Sequence[NDArray[np.int64] | None] = field(repr=False)


def preferred(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> list[NDArray[np.int64] | None]:
    """Returns the tokens whose logits exceed those of the right ones; of equal logits the smaller id is proposed.

    Args:
        logits: float32[n, vocabulary], -inf for tokens that the drafter must not propose.
        tokens: int64[n], the right tokens.

    Returns:
        The lists of `Text.above`.
    """
    above: list[NDArray[np.int64] | None] = []
    for row, token in zip(logits, tokens, strict=True):
        higher = row >= row[token]
        higher[token:] &= row[token:] > row[token]
        ids = np.flatnonzero(higher)
        above.append(ids if np.isfinite(row[token]) and len(ids) <= MOST_ABOVE else None)
    return above


def right_tokens(text: Text, row_of: NDArray[np.int64], k: int, slots: int) -> NDArray[np.bool_]:
    """Tell which of the target's tokens a drafter with K rows and some slots proposes, given all tokens before.

    Args:
        text: The target's text.
        row_of: int64[vocabulary], the place of each token in the order in which tokens are kept, or `NEVER_KEPT`.
        k: The rows of the head.
        slots: The in-context slots.

    Returns:
        bool[n].
    """
    recent: OrderedDict[int, None] = OrderedDict()

    def enter(token: int) -> None:
        if slots and k <= row_of[token] < NEVER_KEPT:
            recent[token] = None
            recent.move_to_end(token)
            if len(recent) > slots:
                recent.popitem(last=False)

    for token in text.prompt:
        enter(token)
    right = np.zeros(len(text.tokens), bool)
    for i, (token, above) in enumerate(zip(text.tokens.tolist(), text.above, strict=True)):
        is_kept = row_of[token] < k or token in recent
        if is_kept and above is not None:
            right[i] = not any(row_of[other] < k or int(other) in recent for other in above)
        enter(token)
    return right


def rounds_of(right: NDArray[np.bool_], draft_length: int) -> int:
    """Count the rounds that a text takes.

    Args:
        right: bool[n], which drafted tokens are accepted.
        draft_length: γ, the tokens of a draft.
    """
    at = rounds = 0
    while at < len(right):
        ahead = right[at : at + draft_length]
        accepted = len(ahead) if ahead.all() else int(np.argmin(ahead))
        at, rounds = at + accepted + 1, rounds + 1
    return rounds
