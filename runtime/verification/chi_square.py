"""The chi-square distribution for even degrees of freedom, where its tail is a finite sum."""

import math
from collections.abc import Callable, Iterator


def survival(statistic: float, freedom: int) -> float:
    """Returns P(χ² ≥ `statistic`) for an even number of degrees of freedom.

    It equals the chance of fewer than freedom / 2 events where statistic / 2 are expected.
    """
    return min(1.0, math.fsum(_poisson(statistic / 2, freedom // 2)))


def critical(alpha: float, freedom: int) -> float:
    """Returns the statistic that chance exceeds with probability `alpha`."""
    return _root(lambda x: alpha - survival(x, freedom))


def power(noncentrality: float, alpha: float, freedom: int) -> float:
    """Returns the chance that a test rejects a noncentral statistic, which is a Poisson(λ/2) mixture of central ones.

    Args:
        noncentrality: λ.
        alpha: The level of the test.
        freedom: The degrees of freedom.
    """
    limit = critical(alpha, freedom)
    terms = int(noncentrality / 2 + 12 * math.sqrt(noncentrality / 2 + 1)) + 12  # the rest weighs under 1e-20
    weights = _poisson(noncentrality / 2, terms)
    return math.fsum(weight * survival(limit, freedom + 2 * k) for k, weight in enumerate(weights))


def noncentrality_for(wanted: float, alpha: float, freedom: int) -> float:
    """Returns the noncentrality at which a test at level `alpha` rejects with probability `wanted`."""
    return _root(lambda x: power(x, alpha, freedom) - wanted)


def _poisson(mean: float, count: int) -> Iterator[float]:
    """Returns the probabilities of 0, 1, …, count − 1 events."""
    log_mean = math.log(mean) if mean else -math.inf
    for k in range(count):
        yield math.exp(k * log_mean - mean - math.lgamma(k + 1)) if k else math.exp(-mean)


def _root(rising: Callable[[float], float]) -> float:
    """Returns the argument, from 0 up, at which a rising function is zero."""
    high = 1.0
    while rising(high) < 0:
        high *= 2
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high
