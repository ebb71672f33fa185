"""Running shares of successes, by bin."""

from collections.abc import Sequence

_PRIOR = 4.0  # tries that a prior counts for
_MEMORY = 256.0  # tries that a bin remembers


class Shares:
    """A running share of successes in each bin, which starts at `priors`; old tries fade."""

    def __init__(self, priors: Sequence[float]) -> None:
        self._tried = [_PRIOR] * len(priors)
        self._hits = [_PRIOR * prior for prior in priors]

    def __getitem__(self, index: int) -> float:
        return self._hits[index] / self._tried[index]

    def count(self, index: int, hit: bool) -> None:
        fade = min(1.0, _MEMORY / (self._tried[index] + 1))
        self._tried[index] = (self._tried[index] + 1) * fade
        self._hits[index] = (self._hits[index] + hit) * fade
