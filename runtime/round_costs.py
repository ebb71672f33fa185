"""The costs of a round's parts: measured while the loop runs, or given."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

_WINDOW = 15  # the number of recent values that a median is taken over
_SLOPE = 0.04  # of a verification's time, what a further row is assumed to cost before two numbers of rows are known
_CERTAINTY = 8.0  # of that, as the squared distance of measured numbers of rows that counts as much
_FASTER = 0.7  # times the median: a call is never that fast by chance, so what was measured before was slowed down
_STEP = 0.2  # of a verification's time, what a drafted token is assumed to cost before one is measured


class Costs(Protocol):
    """Costs of rounds, all in one unit of time."""

    @property
    def knows_plain(self) -> bool:
        """Whether a round without a draft is known and not deduced from others."""

    def observe(self, drafted: int, verified: int, draft_seconds: float, verify_seconds: float, seconds: float) -> bool:
        """Learn from the times of a round.

        Args:
            drafted: Tokens that the drafter drafted.
            verified: Tokens that were verified, looked-up ones included.
            draft_seconds: Time of drafting.
            verify_seconds: Time of the verification.
            seconds: Time of the whole round.

        Returns:
            Whether all times before were forgotten, because another program had slowed them down.
        """

    def round(self, drafted: int, verified: int) -> float:
        """Returns the cost of a round.

        Args:
            drafted: Tokens that the drafter drafts.
            verified: Tokens that are verified, looked-up ones included.
        """


@dataclass(frozen=True, slots=True)
class GivenCosts:
    """Costs as shares of a round without a draft.

    Attributes:
        step: The cost of a drafted token.
        row: The cost of a further row to verify.
    """

    step: float
    row: float
    knows_plain = True

    def observe(self, *_times: float) -> bool:
        """Do nothing: the costs are given."""
        return False

    def round(self, drafted: int, verified: int) -> float:
        return 1 + drafted * self.step + verified * self.row


class _Recent:
    """The median of the last _WINDOW values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_WINDOW)
        self.median = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def was_slowed(self, value: float) -> bool:
        """Returns whether `value` tells that the values before it were slowed down."""
        return value < _FASTER * self.median

    def add(self, value: float) -> None:
        self._values.append(value)
        self.median = median(self._values)


class MeasuredCosts:
    """Medians of measured seconds. A verification's are a line over the rows that it computes, but for the fewest.

    Another program may slow some calls down. Where a call is much faster than those before it, this has ended, and all
    times are forgotten: those of calls that are not made now would stay slow.
    """

    def __init__(self, rows_computed: Callable[[int], int] = int) -> None:
        """Make costs that know no times yet.

        Args:
            rows_computed: The target's `Engine.rows_computed`; by default every token is one row.
        """
        self._rows_computed = rows_computed
        self._forget()

    def _forget(self) -> None:
        self._verify: dict[int, _Recent] = {}  # by rows that are computed
        self._step, self._other = _Recent(), _Recent()
        self._base, self._slope = 1.0, _SLOPE  # until the first round, a verification is the unit

    @property
    def knows_plain(self) -> bool:
        return self._rows_computed(1) in self._verify

    def observe(self, drafted: int, verified: int, draft_seconds: float, verify_seconds: float, seconds: float) -> bool:
        step = draft_seconds / drafted if drafted else self._step.median
        rows = self._rows_computed(verified + 1)
        known = self._verify.get(rows, _Recent())
        were_slowed = known.was_slowed(verify_seconds) or self._step.was_slowed(step)
        if were_slowed:
            self._forget()
        self._verify.setdefault(rows, _Recent()).add(verify_seconds)
        self._other.add(seconds - draft_seconds - verify_seconds)
        if drafted:
            self._step.add(step)
        self._fit()
        return were_slowed

    def round(self, drafted: int, verified: int) -> float:
        rows = self._rows_computed(verified + 1)
        is_fewest = rows == self._rows_computed(1) and self.knows_plain
        verify = self._verify[rows].median if is_fewest else self._base + self._slope * rows
        return drafted * self._step_seconds() + verify + self._other.median

    def _step_seconds(self) -> float:
        return self._step.median if len(self._step) else _STEP * (self._base + self._slope)

    def _fit(self) -> None:
        """Fit a line to the medians by least squares. While they are few, the assumed slope weighs more."""
        several = {rows: each for rows, each in self._verify.items() if rows > 1} or self._verify
        weight = sum(len(each) for each in several.values())
        rows = sum(len(each) * n for n, each in several.items()) / weight
        seconds = sum(len(each) * each.median for each in several.values()) / weight
        spread = sum(len(each) * (n - rows) ** 2 for n, each in several.items())
        product = sum(len(each) * (n - rows) * (each.median - seconds) for n, each in several.items())
        assumed = _SLOPE * seconds
        self._slope = max(0.0, (product + _CERTAINTY * assumed) / (spread + _CERTAINTY))
        self._base = seconds - self._slope * rows
