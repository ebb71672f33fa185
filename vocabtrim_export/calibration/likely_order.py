"""The order in which a trimmed head keeps tokens: by their counts, smoothed towards the order of the tokenizer."""

import numpy as np
from numpy.typing import NDArray

# The weight of the smoothing, over that of the counts. docs/decisions.md states the gain and the cost of 0.1.
_SHARE = 0.1
_OFFSET = 1_000  # in Zipf's law of Mandelbrot's form: the first ids are bytes, no more frequent than the next thousand


def likely_order(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order the tokens, the likeliest first, of equally likely ones the smaller id.

    A tokenizer numbers its tokens in the order in which its training text made them, the most frequent first. So an id
    alone tells something about a token that the counted text has rarely or never: count + 0.1 · N · p(id), with N
    counted tokens and p(id) proportional to 1 / (id + 1,000). Up to some 40,000 tokens this leaves the order of counts
    as it is. With more, a low id comes before a high one that was counted only a few times.

    Args:
        counts: int64[n], the occurrences of each token.

    Returns:
        int64[n], the ids.
    """
    prior = 1 / (np.arange(len(counts)) + _OFFSET)
    return np.argsort(-(counts + _SHARE * counts.sum() * prior / prior.sum()), kind="stable")
