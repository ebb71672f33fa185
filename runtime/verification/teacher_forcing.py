"""What a model predicts after each token of a given text: teacher forcing."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine

# (prompt, tokens) → float32[len(tokens), columns]: row i holds the logits after the prompt and the first i tokens.
Predict: TypeAlias = Callable[[Sequence[int], Sequence[int]], NDArray[np.float32]]


def forced_logits(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """See `Predict`; columns as the engine's `StepOutput.logits` has them. Whatever the cache held is forgotten.

    As few calls as the engine's `max_keep` allows: one for 256 tokens on ONNX Runtime.
    """
    return np.concatenate([*_blocks(engine, prompt, tokens)])


def forced_drafts(target: Engine, drafter: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """What `drafter` makes of the same text, float32[len(tokens) - 1, head_rows]: row i after i + 1 tokens.

    A head reads the features of `target`, of at most `max_keep` tokens. Whatever the caches held is forgotten.
    """
    if not drafter.features_read:
        return forced_logits(drafter, prompt, tokens)[1:]
    if len(tokens) == 1:
        return np.zeros((0, drafter.manifest.head_rows), np.float32)
    target.rewind(0)
    drafter.rewind(0)
    fed = [*prompt, *tokens[:-1]]
    features = target.feed(fed).features[:-1]  # of each token before another
    return drafter.feed_features(fed[1:], features, keep=len(tokens) - 1).logits.copy()


def stepped_logits(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """The rows of `forced_logits` as the engine alone computes them, one token a call: float32[columns] each.

    Whatever the cache held is forgotten. A row is valid until the next one is asked for.
    """
    engine.rewind(0)
    yield engine.feed(prompt).logits[-1]
    for token in tokens[:-1]:  # nothing is asked after the last one
        yield engine.feed([token]).logits[-1]


def _blocks(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    engine.rewind(0)
    fed = [*prompt, *tokens[:-1]]  # nothing is asked after the last one
    begin, end = 0, len(prompt)
    while begin < len(fed):
        keep = min(engine.max_keep, len(fed) - end + 1) if begin == 0 else min(engine.max_keep, len(fed) - begin)
        end = end + keep - 1 if begin == 0 else begin + keep
        yield engine.feed(fed[begin:end], keep=keep).logits.copy()  # valid until the next call only
        begin = end
