"""The number of tokens that a round drafts: the interface that the loop calls, and a fixed number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.round import Round
from runtime.round_costs import Costs
from runtime.shares import Shares


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """The plan for one round's draft.

    Attributes:
        looked_up: Tokens of the match to draft.
        drafted: The most tokens that the drafter drafts.
        pays: False where a round with a draft is expected to take longer than what it gains; then this round is a
            probe, or has no draft.
    """

    looked_up: int
    drafted: int
    pays: bool = True


class DraftLength(Protocol):
    """Decides how long drafts are.

    Attributes:
        longest: The length of the longest draft, in tokens.
        adapts: Lengths change from round to round.
        is_stepwise: Drafts are made token by token, and `goes_on` is asked after each.
        lookups: The shares of looked-up tokens that were right, see `PromptLookup`; None where nothing is looked up.
    """

    @property
    def longest(self) -> int: ...

    @property
    def adapts(self) -> bool: ...

    @property
    def is_stepwise(self) -> bool: ...

    @property
    def lookups(self) -> Shares | None: ...

    def begin(self, chances: Sequence[float] = ()) -> RoundPlan:
        """Plan the next round.

        Args:
            chances: See `Match`; empty where nothing was looked up.
        """

    def goes_on(self, confidence: float) -> bool:
        """Returns whether to draft one more token.

        Args:
            confidence: The drafter's probability of its most likely token, at the token that was drafted last.
        """

    def observe(self, entry: Round) -> None:
        """Learn from the round that was planned last."""

    def afresh(self, costs: Costs) -> "DraftLength":
        """Returns a length by the same rule that has learnt nothing.

        Args:
            costs: The costs of a round's parts.
        """


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Every round drafts `longest` tokens."""

    longest: int
    adapts = is_stepwise = False
    lookups = None

    def begin(self, chances: Sequence[float] = ()) -> RoundPlan:  # noqa: ARG002
        return RoundPlan(0, self.longest)

    def goes_on(self, confidence: float) -> bool:  # noqa: ARG002
        return True

    def observe(self, entry: Round) -> None:
        """Do nothing: the length is fixed."""

    def afresh(self, costs: Costs) -> "FixedLength":  # noqa: ARG002
        return self
