"""Teacher forcing: a model's predictions after each token of a fixed text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine


@dataclass(frozen=True, slots=True)
class GivenText:
    """A text that is there already, along which a model predicts.

    Attributes:
        prompt: Token ids, at least one.
        tokens: The token ids that follow the prompt, at least one; each is predicted.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]

    @property
    def fed(self) -> list[int]:
        """The token ids that a model reads to predict all `tokens`: the whole text but its last token."""
        return [*self.prompt, *self.tokens[:-1]]


# Returns float32[len(tokens), columns]: row i holds the logits after the prompt and the first i tokens.
Predict: TypeAlias = Callable[[GivenText], NDArray[np.float32]]


def teacher_forced_logits(engine: Engine, text: GivenText) -> NDArray[np.float32]:
    """Compute an engine's logits along a text, in as few calls as its `max_keep` allows.

    The engine's cache is emptied first.

    Returns:
        float32[len(tokens), columns]: row i after the prompt and the first i tokens; columns as in `StepOutput.logits`.
    """
    return np.concatenate([*_blocks(engine, text)])


def teacher_forced_drafts(target: Engine, drafter: Engine, text: GivenText) -> NDArray[np.float32]:
    """Compute a drafter's logits along a text. The caches of both engines are emptied first.

    Args:
        target: The engine whose features a head reads; the text then has at most `max_keep` tokens.
        drafter: The drafter; its slots hold what the text had up to each row.
        text: The prompt and the tokens.

    Returns:
        float32[len(tokens) - 1, vocab_size]: row i after the prompt and i + 1 tokens. Column i is token i, -inf where
        the drafter cannot propose it.
    """
    spread = np.full((len(text.tokens) - 1, drafter.manifest.vocab_size), -np.inf, np.float32)
    if len(text.tokens) == 1:
        return spread
    head, at = drafter.head_tokens, 0
    for rows in _drafter_blocks(target, drafter, text):
        columns = np.arange(rows.shape[1]) if head is None else head.kept_token_ids
        is_token = columns >= 0
        spread[at : at + len(rows), columns[is_token]] = rows[:, is_token]
        at += len(rows)
    return spread


def stepped_logits(engine: Engine, text: GivenText) -> Iterator[NDArray[np.float32]]:
    """Compute the rows of `teacher_forced_logits` with one call for each token, as the engine alone generates.

    The engine's cache is emptied first.

    Yields:
        float32[columns], valid until the next row is asked for.
    """
    engine.rewind(0)
    yield engine.feed(text.prompt).logits[-1]
    for token in text.tokens[:-1]:
        yield engine.feed([token]).logits[-1]


def _drafter_blocks(target: Engine, drafter: Engine, text: GivenText) -> Iterator[NDArray[np.float32]]:
    """Yield rows of the drafter's logits, with what its slots held then until the next block is asked for."""
    fed, first = text.fed, len(text.prompt)
    if drafter.features_read:
        target.rewind(0)
        features = target.feed(fed).features[:-1].copy()  # of each token before another
    drafter.rewind(0)
    one_call = len(text.tokens) - 1
    step = 1 if drafter.manifest.slots else one_call if drafter.features_read else min(one_call, drafter.max_keep)
    begin = 0
    for end in [*range(first + step, len(fed), step), len(fed)]:
        drafter.remember(fed[begin:end])
        keep = end - max(begin, first)
        if drafter.features_read:
            output = drafter.feed_features(fed[begin or 1 : end], features[max(begin - 1, 0) : end - 1], keep=keep)
        else:
            output = drafter.feed(fed[begin:end], keep=keep)
        yield output.logits
        begin = end


def _blocks(engine: Engine, text: GivenText) -> Iterator[NDArray[np.float32]]:
    engine.rewind(0)
    fed = text.fed
    begin, end = 0, len(text.prompt)
    while begin < len(fed):
        keep = min(engine.max_keep, len(fed) - end + 1) if begin == 0 else min(engine.max_keep, len(fed) - begin)
        end = end + keep - 1 if begin == 0 else begin + keep
        yield engine.feed(fed[begin:end], keep=keep).logits.copy()  # valid until the next call only
        begin = end
