"""A test of whether tokens follow a distribution: they are mapped to points that should be uniform in [0, 1].

Let p be the distribution that a token should have. [0, 1) is cut into one part for each token, as long as the token's
probability, and a point is drawn within the part of the token that came out. Under p the point is uniform, whatever p
is, and independent of all other points (Rosenblatt 1952). So points of all positions, prompts and seeds are counted in
the same BINS equal bins, and one chi-square test compares the counts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.verification import chi_square

BINS = 17  # an odd number: then the chi-square's tail is a finite sum
FREEDOM = BINS - 1  # degrees of freedom of the test


def point_of(token: int, p: NDArray[np.float32], q: NDArray[np.float32], uniform: float) -> float:
    """Map a token to [0, 1] so that tokens drawn from p are uniform there.

    The interval is divided by p, with tokens in the order of ascending q/p, then of descending p, then of their ids.

    Args:
        token: The token id.
        p: float32[n] over token ids, the distribution that the token should have.
        q: float32[n] over token ids, the drafter's distribution.
        uniform: The place in the token's own part of the interval, 0 to 1.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(p > 0, q / p, np.inf)
    same = ratio == ratio[token]
    before = (ratio < ratio[token]) | (same & (p > p[token]))
    before[:token] |= (same & (p == p[token]))[:token]
    return min(1.0, float(p[before].sum(dtype=np.float64)) + uniform * float(p[token]))


def statistic_of(points: Sequence[float]) -> float:
    """Returns Pearson's chi-square of `points` in [0, 1] against the uniform distribution, with FREEDOM degrees."""
    counts = np.bincount(np.minimum((np.asarray(points) * BINS).astype(np.int64), BINS - 1), minlength=BINS)
    expected = len(points) / BINS
    return float(((counts - expected) ** 2).sum() / expected)


def p_value_of(statistics: tuple[float, float]) -> float:
    """Returns the p-value of the larger of two statistics, doubled because the larger one was chosen."""
    return min(1.0, 2 * chi_square.survival(max(statistics), FREEDOM))
