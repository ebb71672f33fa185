"""Draft lengths where a whole round is one piece of work for a GPU: one of a few, chosen between rounds."""

from itertools import accumulate
from operator import mul

from runtime.adaptive_length import AdaptiveLength
from runtime.round_costs import Costs
from runtime.shares import Shares

TIERS = (1, 3, 7)  # as SGLang's: each captured round takes memory and is warmed up
# The assumed shares of right tokens after a draft that was wrong at once, right for a while, and right to its end. Of
# each pair, the first number is for the first token of a draft, the second for all further tokens.
_PRIORS = (0.35, 0.6, 0.5, 0.65, 0.75, 0.85)
_WRONG, _SOME, _ALL = range(3)


class TieredLength(AdaptiveLength):
    """Drafts as many tokens as one of `tiers`, or none, by the rule of `AdaptiveLength`.

    Within a round that runs without the host nothing stops a draft, and no confidence comes back. So the tier is chosen
    before it, as the one whose expected tokens are worth most beyond its time, by running shares of accepted tokens
    after the outcome of the last draft: easy and hard passages of a text are longer than a round.
    """

    is_stepwise = False

    def __init__(self, tiers: tuple[int, ...], prompt_lookup: bool = True, costs: Costs | None = None) -> None:
        """Make a length that has learnt nothing.

        Args:
            tiers: Numbers of tokens, ascending.
            prompt_lookup: See `AdaptiveLength`.
            costs: See `AdaptiveLength`.
        """
        super().__init__(tiers[-1], prompt_lookup, costs)
        self.tiers = tiers
        self._shares, self._outcome = Shares(_PRIORS), _SOME

    def goes_on(self, confidence: float) -> bool:  # noqa: ARG002
        return True

    def afresh(self, costs: Costs) -> "TieredLength":
        return TieredLength(self.tiers, self.lookups is not None, costs)

    def _most_drafted(self) -> int:
        rate = self._rate()
        return max(self.tiers, key=lambda tier: self._expected(tier) - rate * self._costs.round(tier, tier))

    def _expected(self, tier: int) -> float:
        """Returns the expected number of accepted tokens of a draft of `tier` tokens."""
        shares = (self._shares[self._bin(position)] for position in range(tier))
        return float(sum(accumulate(shares, mul)))

    def _learn(self, drafted: int, accepted: int) -> None:
        for position in range(min(accepted + 1, drafted)):
            self._shares.count(self._bin(position), position < accepted)
        self._outcome = _ALL if accepted == drafted else _SOME if accepted else _WRONG

    def _bin(self, position: int) -> int:
        return 2 * self._outcome + (position > 0)


def tiers_up_to(most: int, unrolled: int = 0) -> tuple[int, ...]:
    """Returns the tiers of a pair.

    Args:
        most: The tokens that the target verifies at most.
        unrolled: The tokens that the drafter drafts in one call, then the only tier. 0: it drafts token by token.
    """
    if 0 < unrolled <= most:
        return (unrolled,)
    return (*(tier for tier in TIERS if tier < most), min(most, TIERS[-1])) if most < TIERS[-1] else TIERS
