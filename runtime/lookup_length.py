"""The draft length of a decoder without a drafter, which drafts by prompt lookup alone."""

from collections.abc import Sequence

from runtime.adaptive_length import AdaptiveLength
from runtime.draft_length import RoundPlan
from runtime.round_costs import Costs


class LookupLength(AdaptiveLength):
    """Verifies what followed the last tokens earlier in the text, as far as it is worth its time; there is no drafter.

    A further token is verified where its share of right tokens is worth more than its row costs (see `AdaptiveLength`).
    """

    is_stepwise = False

    def begin(self, chances: Sequence[float] = ()) -> RoundPlan:
        return RoundPlan(self._looked_up(chances)[0], 0)

    def afresh(self, costs: Costs) -> "LookupLength":
        return LookupLength(self.longest, costs=costs)
