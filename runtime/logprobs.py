"""Log-probabilities of generated tokens, as OpenAI's and vLLM's interfaces report them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-softmax of the target's logits at one position.

    That is the model's own distribution, before penalties, temperature and the like: OpenAI's convention. Under a JSON
    schema it is that of the tokens which the schema allows.

    Attributes:
        token_id: The token that was generated.
        logprob: Its natural logarithm of the probability.
        top: The most likely tokens with theirs, the most likely first; of equal ones the smaller id. They are fewer
            where fewer are possible.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: NDArray[np.float32], tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Returns the log-probability of each of `tokens`, and the `top` most likely alternatives.

    Args:
        logits: float32[len(tokens) or more, vocabulary]; row i predicts `tokens[i]`.
        tokens: Token ids.
        top: The number of alternatives; 0 for none.
    """
    return tuple(_logprob(row, token, top) for row, token in zip(logits, tokens, strict=False))


def _logprob(row: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    highest = row.max()
    total = float(highest) + float(np.log(np.exp(row - highest).sum(dtype=np.float64)))
    alternatives: list[int] = []
    if top := min(top, int((row > -np.inf).sum()) if top else 0):
        least = np.partition(row, len(row) - top)[len(row) - top]
        candidates = np.flatnonzero(row >= least)
        alternatives = candidates[np.lexsort((candidates, -row[candidates]))][:top].tolist()
    return TokenLogprob(token, float(row[token]) - total, tuple((i, float(row[i]) - total) for i in alternatives))
