"""An alarm for the one failure that a lossless loop hides: a drafter of which hardly anything is accepted.

What calibration knows is an upper bound: the drafter can propose `coverage` of the target's tokens, the share of
held-out calibration tokens that its head keeps. A drafter that fits its target has more than a quarter of that accepted
at the first drafted token. Each WINDOW of rounds, none counted twice, is judged by a one-sided binomial test: a drafter
whose first drafted token is accepted with an independent chance of at least coverage / 4 is accused in one window of a
million at most; with a coverage of 90%, one of 2% is found in 99.8% of the windows, one of 5% in 80%. Below a coverage
of 45% a window is too short to tell anything.
"""

import logging
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from math import comb

from engines.bundle.read import Manifest
from runtime.round import Round

WINDOW = 128
FALSE_ALARM = 1e-6
_LEAST_SHARE = 0.25  # of the coverage


@dataclass(frozen=True, slots=True)
class Collapse:
    """A window of rounds in which far too few first drafted tokens were accepted.

    Attributes:
        accepted: The rounds whose first drafted token was accepted.
        rounds: The rounds of the window.
        coverage: See `Manifest`; None for a full head.
    """

    accepted: int
    rounds: int
    coverage: float | None

    def __str__(self) -> str:
        """Returns what was seen and its likely causes, in one line."""
        keeps = "every token" if self.coverage is None else f"{self.coverage:.1%} of the calibration's tokens"
        return (
            f"the first drafted token was accepted in only {self.accepted} of {self.rounds} rounds, though the drafter "
            f"keeps {keeps}: output stays the target's own, but it comes no faster. Likely a kind of text that the "
            "calibration never saw (calibrate on prompts like these), a drafter that was not made for this target, or "
            "a much higher temperature than the calibration's"
        )


class AcceptanceAlarm:
    """Watches the rounds of one generation after the other.

    Attributes:
        collapse: The first collapse; None while there is none.
    """

    def __init__(self, drafter: Manifest | None) -> None:
        self.collapse: Collapse | None = None
        self._coverage = drafter.coverage if drafter else None
        self._rounds = self._accepted = 0

    def observe(self, entry: Round) -> Collapse | None:
        """Returns the collapse if this round shows it, which happens once; else None."""
        if not entry.drafted or entry.looked_up or self.collapse:
            return None
        self._rounds += 1
        self._accepted += entry.accepted > 0
        if self._rounds == WINDOW:
            if is_collapse(self._accepted, self._coverage):
                self.collapse = Collapse(self._accepted, WINDOW, self._coverage)
            self._rounds = self._accepted = 0
        return self.collapse

    def watch(self, rounds: Generator[Round, None, None]) -> Generator[Round, None, None]:
        """Pass `rounds` on, with a warning once acceptance collapses."""
        with closing(rounds):
            for entry in rounds:
                if collapse := self.observe(entry):
                    logging.getLogger("runtime").warning("%s", collapse)
                yield entry


def find_collapse(rounds: Iterable[Round], drafter: Manifest) -> Collapse | None:
    """Returns the first collapse in `rounds`; None where there is none."""
    alarm = AcceptanceAlarm(drafter)
    return next(filter(None, map(alarm.observe, rounds)), None)


def is_collapse(accepted: int, coverage: float | None) -> bool:
    """Returns whether a sound pair accepts so few of WINDOW first drafted tokens with a chance below FALSE_ALARM.

    Args:
        accepted: The rounds of a window whose first drafted token was accepted.
        coverage: The share of the target's tokens that the drafter can propose; None for a full head.
    """
    rate = _LEAST_SHARE * (1.0 if coverage is None else coverage)
    few = sum(comb(WINDOW, count) * rate**count * (1 - rate) ** (WINDOW - count) for count in range(accepted + 1))
    return few < FALSE_ALARM
