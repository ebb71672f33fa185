"""`--calibration-tokens auto`: whether more generated tokens would still change what a trimmed head keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vocabtrim_export.calibration.likely_order import likely_order

# Counting stops where both hold. Doubling the tokens then gained less than this share of the held-out tokens,
GAIN = 0.002
# and the coverage is known to within this, half of a 95% interval.
PRECISION = 0.01
# The most tokens that are counted. Generating 200,000 takes hours on a CPU. A text is read up to its bound, where
# stopping early would save nothing: a core counts 500,000 of its tokens in a second.
MOST_GENERATED, MOST_OF_TEXT = 200_000, 20_000_000
FIRST_LOOK = 4_096  # tokens; later looks follow at every doubling
_RESAMPLES = 1_000
_COUNTS = "halfway"
_TOKENS, _ENDS = "held_out_tokens", "held_out_ends"

# Rows of the head: a number, or the share of the held-out tokens that they are to cover.
HeadSize = int | float


@dataclass(frozen=True, slots=True)
class Sufficiency:
    """The result of a look at the counts.

    Attributes:
        tokens: Tokens counted.
        distinct: Different tokens among those that choose the rows.
        rows: Rows of the head.
        coverage: Share of the held-out tokens that these rows cover.
        low: Lower end of the coverage's 95% bootstrap interval, over documents.
        high: Its upper end.
        halves: The coverage of the rows that each half of the counts would choose.
    """

    tokens: int
    distinct: int
    rows: int
    coverage: float
    low: float
    high: float
    halves: tuple[float, float]

    @property
    def is_enough(self) -> bool:
        return self.coverage - min(self.halves) <= GAIN and self.high - self.low <= 2 * PRECISION

    def __str__(self) -> str:
        """Returns one line for the user."""
        first, second = self.halves
        what = (
            "more would change little" if self.is_enough else "more would still change the kept tokens: give a number"
        )
        never = f", {self.rows - self.distinct} of them never counted," if self.distinct < self.rows else ""
        return (
            f"calibration stopped at {self.tokens} tokens, {what}: {self.rows} rows{never} cover {self.coverage:.2%} "
            f"of held-out tokens (95% interval {self.low:.2%} to {self.high:.2%}), chosen by either half of the tokens "
            f"{first:.2%} and {second:.2%}"
        )


class Evidence:
    """The state, besides the counts, from which a look decides whether the tokens are enough.

    It is a function of the documents counted, so that an interrupted calibration stops at the same token as an
    uninterrupted one.

    Args:
        rows: Rows of the head that the counts are to choose.
        saved: The result of `tensors` in an earlier run; empty for a fresh one.
        full_vocab: The number of tokens.
    """

    def __init__(self, rows: HeadSize, full_vocab: int, saved: Mapping[str, NDArray[np.int64]]) -> None:
        self.rows = rows
        self.halfway = np.array(saved.get(_COUNTS, np.zeros(full_vocab)), np.int64)
        ids, ends = (saved.get(name, np.empty(0, np.int64)) for name in (_TOKENS, _ENDS))
        self.held_out: list[NDArray[np.int64]] = np.split(ids, ends)[:-1] if len(ends) else []

    def tensors(self) -> dict[str, NDArray[np.int64]]:
        """Returns the state, to be saved with the counts."""
        ids = np.concatenate([np.empty(0, np.int64), *self.held_out])
        ends = np.cumsum([len(document) for document in self.held_out], dtype=np.int64)
        return {_COUNTS: self.halfway, _TOKENS: ids, _ENDS: ends}

    def add(self, tokens: Sequence[NDArray[np.int64]]) -> None:
        """Add the tokens of held-out documents."""
        self.held_out += [np.asarray(document, np.int64) for document in tokens if len(document)]

    def look(self, counts: NDArray[np.int64], held_out: NDArray[np.int64]) -> Sufficiency | None:
        """Compare the halves of the counts, where they doubled since the last look; None before that."""
        total, before = int(counts.sum()), int(self.halfway.sum())
        if total < max(FIRST_LOOK, 2 * before):
            return None
        halfway, self.halfway = self.halfway, counts.copy()
        if before == 0 or not self.held_out:
            return None
        return self._judge(counts, halfway, held_out)

    def _judge(self, counts: NDArray[np.int64], first: NDArray[np.int64], held_out: NDArray[np.int64]) -> Sufficiency:
        rows = rows_of(self.rows, counts, held_out)
        kept = _kept(counts, rows)
        hits = np.array([np.count_nonzero(kept[document]) for document in self.held_out])
        sizes = np.array([len(document) for document in self.held_out])
        random = np.random.default_rng(0)
        draws = (random.integers(0, len(sizes), len(sizes)) for _ in range(_RESAMPLES))
        low, high = np.quantile([hits[draw].sum() / sizes[draw].sum() for draw in draws], [0.025, 0.975])
        whole = max(1, int(held_out.sum()))
        halves = tuple(int(held_out[_kept(half, rows)].sum()) / whole for half in (first, counts - first))
        total, distinct = int(counts.sum() + held_out.sum()), int(np.count_nonzero(counts))
        covered = int(held_out[kept].sum()) / whole
        return Sufficiency(total, distinct, rows, covered, float(low), float(high), (halves[0], halves[1]))


def rows_of(rows: HeadSize, counts: NDArray[np.int64], held_out: NDArray[np.int64]) -> int:
    """Returns a number of rows, at most that of the vocabulary.

    Args:
        rows: The number itself, or the share of held-out tokens that the fewest rows are to cover.
        counts: int64[vocabulary], by which rows are chosen.
        held_out: int64[vocabulary], the tokens to cover.
    """
    if isinstance(rows, int):
        return min(rows, len(counts))
    covered = np.cumsum(held_out[likely_order(counts)])
    return min(int(np.searchsorted(covered, rows * covered[-1])) + 1, len(counts))


def _kept(counts: NDArray[np.int64], rows: int) -> NDArray[np.bool_]:
    """Returns bool[full_vocab]: the tokens that a head of `rows` rows keeps."""
    kept = np.zeros(len(counts), np.bool_)
    kept[likely_order(counts)[:rows]] = True
    return kept
