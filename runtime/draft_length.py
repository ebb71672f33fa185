"""How many tokens a round drafts: a fixed number, or as many as are worth their time on this text and machine."""

from dataclasses import dataclass, field
from typing import Protocol

_BINS = 10  # of the drafter's confidence, of equal width
_PRIOR = 4.0  # judged tokens that the drafter's own confidence counts for
_MEMORY = 200.0  # judged tokens that a bin remembers
_WEIGHT = 1 / 16  # of the newest round in running means
_FIRST_WAIT = 4  # rounds without a draft before the first probe
_PLAIN_EVERY = 256  # rounds after which one without a draft measures the target's single step again


class DraftLength(Protocol):
    """Decides how long drafts are.

    longest: no draft is longer. adapts: drafts are made token by token, and `goes_on` is asked after each.
    """

    @property
    def longest(self) -> int: ...

    @property
    def adapts(self) -> bool: ...

    def begin(self) -> int:
        """Returns the most tokens that the next round may draft; 0 for a round without a draft."""

    def goes_on(self, confidence: float) -> bool:
        """Whether to draft one more token. confidence: the drafter's probability of its most likely token, for the
        token that was drafted last."""

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float, seconds: float) -> None:
        """Take in a round: tokens drafted and accepted, and seconds of drafting, of verifying and of all of it."""


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Every round drafts `longest` tokens."""

    longest: int
    adapts = False

    def begin(self) -> int:
        return self.longest

    def goes_on(self, confidence: float) -> bool:  # noqa: ARG002
        return True

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float, seconds: float) -> None:
        """Nothing: the length stays."""


class _Rate:
    """A running share of successes in each bin of confidence, that starts at the confidence itself."""

    def __init__(self) -> None:
        self._tried = [_PRIOR] * _BINS
        self._hits = [_PRIOR * (i + 0.5) / _BINS for i in range(_BINS)]

    def __getitem__(self, index: int) -> float:
        return self._hits[index] / self._tried[index]

    def count(self, index: int, hit: bool) -> None:
        fade = min(1.0, _MEMORY / (self._tried[index] + 1))
        self._tried[index] = (self._tried[index] + 1) * fade
        self._hits[index] = (self._hits[index] + hit) * fade


class _Mean:
    """A running mean. One value far above the mean, such as another program's turn on the core, counts as three."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def add(self, value: float) -> None:
        if self.value is None:
            self.value = value
        else:
            self.value += _WEIGHT * (min(value, 3 * self.value) - self.value)


@dataclass(slots=True)
class _Costs:
    """Measured seconds. verify: of the target's call by its number of rows. step: of one drafted token."""

    verify: dict[int, _Mean] = field(default_factory=dict)
    step: _Mean = field(default_factory=_Mean)

    def verify_seconds(self, rows: int) -> float:
        """Between two measured numbers of rows, interpolated; outside of them, the nearest one's."""
        known = sorted(self.verify)
        below = max((n for n in known if n <= rows), default=known[0])
        above = min((n for n in known if n >= rows), default=known[-1])
        low, high = self.verify[below].value or 0.0, self.verify[above].value or 0.0
        return low if below >= above else low + (high - low) * (rows - below) / (above - below)

    def next_token(self, drafted: int) -> float:
        """Seconds that one more drafted token costs after `drafted` ones: its step, and one more row to verify."""
        return (self.step.value or 0.0) + self.verify_seconds(drafted + 2) - self.verify_seconds(drafted + 1)


class AdaptiveLength:
    """Drafts a token where the tokens that it is expected to gain are worth more than the time that it costs.

    A round gains tokens and takes seconds, and the loop is fastest where each part of a round gains at least what the
    loop makes of the same time anyway (Dinkelbach's method for a ratio). So a further token is drafted where

        P(all drafted so far are accepted) · P(the next one is) > tokens per second · seconds of the next one.

    The probabilities are running shares of accepted tokens by the drafter's confidence in the token before. The rate is
    the loop's own, and never less than target-only decoding's. Where even the first token is not worth its time, rounds
    draft nothing; after ever longer waits one of them probes, so that a text which becomes predictable is noticed.

    longest: the most tokens of a draft. Its state outlives a generation: costs and confidence belong to the pair.
    """

    adapts = True

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._is_right, self._next_is_right = _Rate(), _Rate()
        self._first = _Mean(0.7)  # share of the rounds with a draft whose first token was accepted
        self._later = _Mean(0.7)  # share of later tokens, of those that were judged
        self._costs = _Costs()
        self._tokens, self._seconds = _Mean(), _Mean()  # of a round
        self._bins: list[int] = []  # of the draft at hand
        self._chance = 1.0  # that all of it is accepted
        self._is_probe = False
        self._wait, self._left = _FIRST_WAIT, 0
        self._rounds = 0

    def begin(self) -> int:
        self._bins, self._chance, self._is_probe = [], 1.0, False
        self._rounds += 1
        if self._rounds % _PLAIN_EVERY == 2:  # also early: the rate of target-only decoding is what drafts must beat
            return 0
        if self._pays():
            self._wait, self._left = _FIRST_WAIT, 0
            return self.longest
        if self._left == 0:
            self._left = self._wait
        self._left -= 1
        self._is_probe = self._left == 0
        return 1 if self._is_probe else 0

    def goes_on(self, confidence: float) -> bool:
        index = min(int(confidence * _BINS), _BINS - 1)
        self._bins.append(index)
        self._chance *= self._is_right[index]
        if not self._costs.verify:  # nothing measured yet
            return len(self._bins) < 4
        gain = self._chance * self._next_is_right[index]
        return gain > self._rate() * self._costs.next_token(len(self._bins))

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float, seconds: float) -> None:
        self._costs.verify.setdefault(drafted + 1, _Mean()).add(verify_seconds)
        self._tokens.add(accepted + 1)
        self._seconds.add(seconds)
        if drafted == 0:
            return
        self._costs.step.add(draft_seconds / drafted)
        self._first.add(float(accepted > 0))
        for i, index in enumerate(self._bins[: accepted + 1]):
            self._is_right.count(index, i < accepted)
            if i > 0:
                self._later.add(float(i < accepted))
                self._next_is_right.count(self._bins[i - 1], i < accepted)
        if self._is_probe:
            self._wait = 1 if accepted else max(_FIRST_WAIT, 2 * self._wait)

    def _pays(self) -> bool:
        """Whether a draft of some length is expected to gain more than its time."""
        if not self._costs.verify or self._costs.step.value is None:
            return True
        gain, chance, rate = 0.0, self._first.value or 0.0, self._rate()
        for drafted in range(self.longest):
            gain += chance - rate * self._costs.next_token(drafted)
            if gain > 0:
                return True
            chance *= self._later.value or 0.0
        return False

    def _rate(self) -> float:
        """Tokens per second: the loop's, or target-only decoding's where that is more."""
        loop = (self._tokens.value or 0.0) / (self._seconds.value or 1.0)
        return max(loop, 1 / self._costs.verify_seconds(1))
