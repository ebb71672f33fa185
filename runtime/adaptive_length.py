"""A draft length that adapts: as many tokens as are worth their time on this text and machine."""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul

from runtime.draft_length import RoundPlan
from runtime.prompt_lookup import LOOKUP_PRIORS
from runtime.round import Round
from runtime.round_costs import Costs, MeasuredCosts
from runtime.shares import Shares

_EDGES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.995)  # bins of the drafter's confidence are between these
_LOOP_MEMORY = 64.0  # rounds that the loop's rate remembers
_DRAFTED_MEMORY = 8.0  # rounds with a draft that decide whether drafting pays
_PRIOR_TOKENS = 2.5  # tokens gained by the one round with a draft that is assumed before the first
_FIRST_WAIT, _LONGEST_WAIT = 4, 64  # rounds up to the next draft where drafting does not pay, or matches replace it
_CLOSE = 1.3  # below this many times target-only speed, a plain round is measured and not deduced
_PLAIN_EVERY = 256  # rounds after which a plain one is measured again


class _TokenRate:
    """The tokens per second of about the last `memory` rounds; older ones fade."""

    def __init__(self, memory: float) -> None:
        self._keep = 1 - 1 / memory
        self._rounds = self._tokens = self._seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self._rounds = self._rounds * self._keep + 1
        self._tokens = self._tokens * self._keep + tokens
        self._seconds = self._seconds * self._keep + seconds

    @property
    def value(self) -> float:
        """0 before the first round."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def mean(self) -> tuple[float, float]:
        """The mean tokens and seconds of a round. There was at least one round."""
        return self._tokens / self._rounds, self._seconds / self._rounds


def _confidences() -> Shares:
    edges = (0.0, *_EDGES, 1.0)
    return Shares(tuple((low + high) / 2 for low, high in pairwise(edges)))


class AdaptiveLength:
    """Drafts a token where the tokens that it is expected to gain are worth more than the time that it costs.

    A round gains tokens and takes seconds, and the loop is fastest where each part of a round gains at least what the
    loop makes of the same time anyway (Dinkelbach's method for a ratio). So a further token is drafted where

        P(all drafted so far are accepted) · P(the next one is) > tokens per second · seconds of the next one,

    or where this holds of the next two together: a target that computes rows in pairs verifies every second token for
    nothing.

    The probabilities are running shares of accepted tokens by the drafter's confidence in the token before. The rate is
    the loop's own, and never less than target-only decoding's. Where rounds with a draft gain less than target-only
    decoding, rounds draft nothing; after ever longer waits one of them probes, so that a text which becomes predictable
    is noticed. A probe also comes where weak matches of the text replaced every draft. Seconds are medians of what was
    measured, so that a single slow moment of the machine decides nothing.

    Its state outlives a generation: costs and confidence belong to the pair.
    """

    adapts = is_stepwise = True

    def __init__(self, longest: int, prompt_lookup: bool = True, costs: Costs | None = None) -> None:
        """Make a length that has learnt nothing.

        Args:
            longest: The most tokens of a draft.
            prompt_lookup: Whether looked-up tokens are drafted too.
            costs: The costs of a round's parts; None measures them.
        """
        self.longest = longest
        self.lookups = Shares(LOOKUP_PRIORS) if prompt_lookup else None
        self._costs = MeasuredCosts() if costs is None else costs
        self._is_right, self._next_is_right = _confidences(), _confidences()
        self._loop, self._drafted = _TokenRate(_LOOP_MEMORY), _TokenRate(_DRAFTED_MEMORY)
        self._bins: list[int] = []  # of the draft at hand
        self._chance = 1.0  # that all of it is accepted
        self._wait, self._idle = _FIRST_WAIT, 0  # rounds: before a draft is due, and since the last one
        self._rounds = 0

    def begin(self, chances: Sequence[float] = ()) -> RoundPlan:
        self._bins, self._chance = [], 1.0
        self._rounds += 1
        pays, is_due = self._pays(), self._idle + 1 >= self._wait
        looked_up, gain = self._looked_up(chances)
        rival = self._drafter_gain() if pays else 0.0
        # A match may cost nothing to verify. Only one that gains a token puts off a draft that is due.
        if looked_up > 0 and gain > (max(rival, 1.0) if is_due else rival):
            return RoundPlan(looked_up, 0)
        if pays:
            return RoundPlan(0, 0 if self._must_measure_plain() else self._most_drafted())
        return RoundPlan(0, self._most_drafted() if is_due else 0, pays=False)

    def goes_on(self, confidence: float) -> bool:
        index = bisect(_EDGES, confidence)
        self._bins.append(index)
        self._chance *= self._is_right[index]
        share = self._next_is_right[index]
        gain = self._chance * share
        return self._is_worth(1, gain) or self._is_worth(2, gain * (1 + share))

    def observe(self, entry: Round) -> None:
        accepted, stepped = entry.accepted, entry.drafted - entry.looked_up
        seconds = entry.seconds - entry.prefill_seconds
        if self._costs.observe(stepped, entry.drafted, entry.draft_seconds, entry.verify_seconds, seconds):
            self._loop, self._drafted = _TokenRate(_LOOP_MEMORY), _TokenRate(_DRAFTED_MEMORY)
            self._wait = _FIRST_WAIT
        spent = self._costs.round(stepped, entry.drafted)
        self._loop.add(accepted + 1, spent)
        self._idle = 0 if stepped else self._idle + 1
        if stepped == 0:
            return
        if self._drafted.value == 0:
            self._drafted.add(_PRIOR_TOKENS, self._costs.round(1, 1))
        self._drafted.add(accepted + 1, spent)
        self._learn(stepped, accepted)
        if self._pays():
            self._wait = _FIRST_WAIT
        else:  # this was a probe, or the draft that told that drafting does not pay
            gained = accepted + 1 > spent * self._plain_rate()
            self._wait = 1 if gained else min(_LONGEST_WAIT, max(_FIRST_WAIT, 2 * self._wait))

    def afresh(self, costs: Costs) -> "AdaptiveLength":
        return AdaptiveLength(self.longest, self.lookups is not None, costs)

    def _most_drafted(self) -> int:
        """Returns the most tokens that the drafter drafts in a round."""
        return self.longest

    def _learn(self, drafted: int, accepted: int) -> None:  # noqa: ARG002
        """Learn how many tokens of the drafter's draft were right."""
        for i, index in enumerate(self._bins[: accepted + 1]):
            self._is_right.count(index, i < accepted)
            if i > 0:
                self._next_is_right.count(self._bins[i - 1], i < accepted)

    def _is_worth(self, more: int, gain: float) -> bool:
        """Returns whether drafting so many more tokens, which gain `gain` tokens, is worth its time."""
        now, then = len(self._bins), len(self._bins) + more
        seconds = self._costs.round(then, then) - self._costs.round(now, now)
        return then <= self.longest and gain > self._rate() * seconds

    def _looked_up(self, chances: Sequence[float]) -> tuple[int, float]:
        """Returns how many tokens of a match are worth verifying, and the tokens gained beyond their time's worth."""
        plain, rate = self._costs.round(0, 0), self._rate()
        count, most, expected = 0, 0.0, 0.0
        for length, chance in enumerate(accumulate(chances[: self.longest], mul), 1):
            expected += chance
            gain = expected - rate * (self._costs.round(0, length) - plain)
            if gain > most:
                count, most = length, gain
        return count, most

    def _drafter_gain(self) -> float:
        """Returns the tokens that a round with the drafter's draft gains beyond its time's worth."""
        tokens, seconds = self._drafted.mean if self._drafted.value else (_PRIOR_TOKENS, self._costs.round(1, 1))
        return tokens - 1 - self._rate() * (seconds - self._costs.round(0, 0))

    def _pays(self) -> bool:
        return self._drafted.value == 0 or self._drafted.value > self._plain_rate()

    def _must_measure_plain(self) -> bool:
        """Returns whether drafting gains so little that this round should measure a round without a draft."""
        if self._drafted.value > _CLOSE * self._plain_rate() or self._drafted.value == 0:
            return False
        return not self._costs.knows_plain or self._rounds % _PLAIN_EVERY == 0

    def _plain_rate(self) -> float:
        """Returns the tokens per second of rounds without a draft."""
        return 1 / self._costs.round(0, 0)

    def _rate(self) -> float:
        """Returns the tokens per second: the loop's, or target-only decoding's where that is more."""
        return max(self._loop.value, self._plain_rate())
