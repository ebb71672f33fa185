"""Turn logits into probabilities and draw a token, without sorting the vocabulary."""

import math

import numpy as np
from numpy.typing import NDArray

from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams

_BLOCK = 256  # entries that `sample` sums before it looks inside
_CUTOFFS = (2**-6, 2**-10, 2**-14, 2**-18, 2**-24, 0.0)  # of the highest weight: how far down top-p looks in turn


def distribution(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float32]:
    """Returns the probabilities of the next token, float32[rows, n], as a new array.

    The same tokens survive as in transformers' `TemperatureLogitsWarper`, `TopKLogitsWarper` (which keeps ties with the
    k-th logit), `TopPLogitsWarper` (the fewest tokens that hold `top_p` of what top-k left; of equal ones the smaller
    id) and `MinPLogitsWarper`.

    Args:
        logits: float32[rows, n]; −inf marks a token that must not be chosen.
        params: Temperature, top-k, top-p and min-p; not greedy.

    Raises:
        VocabtrimError: The logits are NaN or +inf, or no token is left.
        ValueError: `params` are greedy.
    """
    if params.is_greedy:
        raise ValueError("greedy decoding has no distribution: take the most likely token")
    probabilities = np.empty(logits.shape, np.float32)
    with np.errstate(over="ignore"):  # a bias or a penalty may be as large as float32 allows
        for row, result in zip(logits, probabilities, strict=True):
            _warp(row, params, result)
    return probabilities


def largest_probability(logits: NDArray[np.float32]) -> float:
    """Returns the probability of the most likely token at temperature 1; NaN where a logit is NaN.

    Args:
        logits: float32[n].
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a bias or a penalty may be as large as float32 allows
        return float(1 / np.exp(logits - logits.max()).sum())


def sample(weights: NDArray[np.float32], rng: np.random.Generator) -> int:
    """Draw an index in proportion to `weights`, by one uniform number.

    Blocks are summed first, and only one is accumulated: a running sum over 262k entries takes ten times as long.

    Args:
        weights: float32[n], not negative and not all zero.
        rng: Gives the uniform number.

    Raises:
        VocabtrimError: All weights are zero, or one is NaN or infinite.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    whole = float(sums[-1])  # NaN or infinite if any weight is
    if not 0 < whole < math.inf:
        raise VocabtrimError(
            f"cannot sample: the probabilities add up to {whole}, which is not finite and positive; export the "
            "model again with a wider --dtype"
        )
    point = rng.random() * whole  # below the whole, as random() is below 1
    block = int(sums.searchsorted(point, "right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    rest = point - float(sums[block - 1]) if block else point
    # The two sums round differently: stay below the last one, so that the entry found never weighs zero.
    return block * _BLOCK + int(inside.searchsorted(min(rest, math.nextafter(inside[-1], 0)), "right"))


def _warp(row: NDArray[np.float32], params: SamplingParams, result: NDArray[np.float32]) -> None:
    """Write the probabilities of one row into `result`."""
    highest = row.max()  # NaN if any is
    if not math.isfinite(highest):
        raise VocabtrimError("the model's logits are not finite: export it again with a wider --dtype")
    kept = _top_k(row, params.top_k) if 0 < params.top_k < len(row) else None
    weights = np.subtract(row, highest, out=result) if kept is None else row[kept] - highest
    weights /= params.temperature
    np.exp(weights, out=weights)
    if params.top_p < 1:
        inside = _top_p(weights, params.top_p)
        kept, weights = inside if kept is None else kept[inside], weights[inside]
    if params.min_p > 0:  # the highest weight is 1
        inside = np.flatnonzero(weights >= params.min_p)
        kept, weights = inside if kept is None else kept[inside], weights[inside]
    weights /= float(weights.sum())
    if kept is not None:
        result.fill(0)
        result[kept] = weights


def _top_k(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices, ascending, of the `k` highest values and of those equal to the k-th."""
    return np.flatnonzero(row >= np.partition(row, len(row) - k)[len(row) - k])


def _top_p(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest `weights` whose sum reaches `top_p` of the whole. The highest weight is 1."""
    wanted = top_p * float(weights.sum())
    for cutoff in _CUTOFFS:  # most often a few hundred weights hold the mass: only these are sorted
        candidates = weights[weights >= cutoff]
        if candidates.sum() >= wanted:
            break
    candidates = np.sort(candidates)[::-1]
    last = min(int(candidates.cumsum(dtype=np.float64).searchsorted(wanted)), len(candidates) - 1)
    lowest = candidates[last]
    above = np.flatnonzero(weights > lowest)
    ties = np.flatnonzero(weights == lowest)[: last + 1 - len(above)]
    return np.sort(np.concatenate([above, ties]))
