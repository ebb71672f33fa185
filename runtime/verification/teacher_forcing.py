"""What a model predicts after each token of a given text: teacher forcing."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine

# (prompt, tokens) → float32[len(tokens), columns]: row i holds the logits after the prompt and the first i tokens.
Predict: TypeAlias = Callable[[Sequence[int], Sequence[int]], NDArray[np.float32]]


def forced_logits(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """Compute an engine's logits along a given text, in as few calls as its `max_keep` allows.

    The engine's cache is emptied first.

    Args:
        engine: The engine.
        prompt: Token ids.
        tokens: The token ids that follow the prompt.

    Returns:
        float32[len(tokens), columns]: row i after the prompt and the first i tokens; columns as in `StepOutput.logits`.
    """
    return np.concatenate([*_blocks(engine, prompt, tokens)])


def forced_drafts(target: Engine, drafter: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """Compute a drafter's logits along a given text. The caches of both engines are emptied first.

    Args:
        target: The engine whose features a head reads; at most `max_keep` tokens of the text then.
        drafter: The drafter; its slots hold what the text had up to each row.
        prompt: Token ids.
        tokens: The token ids that follow the prompt.

    Returns:
        float32[len(tokens) - 1, vocab_size]: row i after the prompt and i + 1 tokens. Column i is token i, -inf where
        the drafter cannot propose it.
    """
    spread = np.full((len(tokens) - 1, drafter.manifest.vocab_size), -np.inf, np.float32)
    if len(tokens) == 1:
        return spread
    head, at = drafter.head_tokens, 0
    for rows in _drafter_blocks(target, drafter, prompt, tokens):
        columns = np.arange(rows.shape[1]) if head is None else head.kept_token_ids
        is_token = columns >= 0
        spread[at : at + len(rows), columns[is_token]] = rows[:, is_token]
        at += len(rows)
    return spread


def stepped_logits(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """Compute the rows of `forced_logits` with one call for each token, as the engine alone generates.

    The engine's cache is emptied first.

    Args:
        engine: The engine.
        prompt: Token ids.
        tokens: The token ids that follow the prompt.

    Yields:
        float32[columns], valid until the next row is asked for.
    """
    engine.rewind(0)
    yield engine.feed(prompt).logits[-1]
    for token in tokens[:-1]:  # nothing is asked after the last one
        yield engine.feed([token]).logits[-1]


def _drafter_blocks(
    target: Engine, drafter: Engine, prompt: Sequence[int], tokens: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    """Rows of the drafter's logits, with what its slots held then until the next block is asked for."""
    fed, first = [*prompt, *tokens[:-1]], len(prompt)
    if drafter.features_read:
        target.rewind(0)
        features = target.feed(fed).features[:-1].copy()  # of each token before another
    drafter.rewind(0)
    one_call = len(tokens) - 1
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


def _blocks(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    engine.rewind(0)
    fed = [*prompt, *tokens[:-1]]  # nothing is asked after the last one
    begin, end = 0, len(prompt)
    while begin < len(fed):
        keep = min(engine.max_keep, len(fed) - end + 1) if begin == 0 else min(engine.max_keep, len(fed) - begin)
        end = end + keep - 1 if begin == 0 else begin + keep
        yield engine.feed(fed[begin:end], keep=keep).logits.copy()  # valid until the next call only
        begin = end
