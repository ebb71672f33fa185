"""`Stats`: the sums over rounds, and the speed-ups that follow from them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from runtime.alarm import Collapse
from runtime.round import Round


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over the rounds of one generation or of several. Times are in seconds.

    Attributes:
        tokens: Generated tokens.
        prefills: Target calls that read a prompt and gave its first token.
        rounds: Target calls after these, with a draft to verify or without one.
        drafted: Drafted tokens that the target verified.
        accepted: Drafted tokens that it accepted.
        acceptance: Entry i is the share of the rounds with more than i drafted tokens in which more than i were
            accepted.
        seconds: All of the rounds; the time that a caller takes between rounds is not counted.
        prefill_seconds: Reading prompts.
        draft_seconds: Drafting.
        verify_seconds: The target's verification.
        collapse: The first collapse of acceptance that the decoder has had, in this generation or an earlier one.
        looked_up: Drafted tokens that the text itself gave (prompt lookup) and not the drafter.
        looked_up_accepted: Those of them that the target accepted.
        paused: Rounds of an adaptive draft length that found that drafting does not pay; few of them draft, as probes.
        cached: Tokens of prompts that the target's cache held already, so that they were not read again.
    """

    tokens: int
    prefills: int
    rounds: int
    drafted: int
    accepted: int
    acceptance: tuple[float, ...]
    seconds: float
    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float
    collapse: Collapse | None = None
    looked_up: int = 0
    looked_up_accepted: int = 0
    paused: int = 0
    cached: int = 0

    @property
    def other_seconds(self) -> float:
        """The time that is neither prefill nor drafting nor verification."""
        return self.seconds - self.prefill_seconds - self.draft_seconds - self.verify_seconds

    @property
    def block_efficiency(self) -> float:
        """τ: tokens gained per target call, prefills and their first tokens not counted. 0 without such a call."""
        return (self.tokens - self.prefills) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all seconds, prefills included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields and what follows from them, ready for `json.dumps`."""
        derived = "other_seconds", "block_efficiency", "tokens_per_second"
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The 50th, 90th and 99th percentile of some values, interpolated between two values."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles | None":
        """Returns the percentiles of `values`, or None where there are none."""
        listed = list(values)
        return cls(*np.percentile(listed, (50, 90, 99)).tolist()) if listed else None


def summarize(rounds: Iterable[Round], collapse: Collapse | None = None) -> Stats:
    """Add up the rounds of one generation, or of several.

    Args:
        rounds: The rounds in order.
        collapse: See `Stats`.
    """
    every = list(rounds)
    later = [entry for entry in every if not entry.is_prefill]
    return Stats(
        tokens=sum(len(entry.tokens) for entry in every),
        prefills=len(every) - len(later),
        rounds=len(later),
        drafted=sum(entry.drafted for entry in later),
        accepted=sum(entry.accepted for entry in later),
        acceptance=_acceptance(later),
        seconds=sum(entry.seconds for entry in every),
        prefill_seconds=sum(entry.prefill_seconds for entry in every),
        draft_seconds=sum(entry.draft_seconds for entry in every),
        verify_seconds=sum(entry.verify_seconds for entry in every),
        collapse=collapse,
        looked_up=sum(entry.looked_up for entry in later),
        looked_up_accepted=sum(min(entry.accepted, entry.looked_up) for entry in later),
        paused=sum(entry.is_paused for entry in later),
        cached=sum(entry.cached for entry in every),
    )


def mbsu(block_efficiency: float, cost_ratio: float, draft_length: float, verify_ratio: float = 1.0) -> float:
    """Returns the memory-bound speed-up τ / (c·γ + v); with v = 1 it is that of arXiv 2506.22694.

    It is what to expect where reading memory is all that takes time.

    Args:
        block_efficiency: τ, the tokens gained per target call.
        cost_ratio: c, the bytes that the drafter reads per step over the bytes that the target reads.
        draft_length: γ, the drafted tokens per round.
        verify_ratio: v, the bytes that a verification reads over those of a target's step. A mixture of experts reads
            more experts for several tokens than for one.
    """
    return block_efficiency / (cost_ratio * draft_length + verify_ratio)


def latency_speedup(
    block_efficiency: float, draft_step: float, verify: float, target_step: float, draft_length: float
) -> float:
    """Returns the speed-up by measured latency, τ / (c·γ + v).

    c is draft_step / target_step, and v is verify / target_step. This is theorem 3.8 of Leviathan et al. 2023, arXiv
    2211.17192, where v is 1; with v it is as Sadhukhan et al. 2024, arXiv 2408.11049, put it. MBSU asks what memory
    allows; this asks what a step and the verification of γ + 1 tokens cost here. Prefills and the time outside the
    engines are left out. The three times have one unit.

    Args:
        block_efficiency: τ, the tokens gained per target call.
        draft_step: The time of one draft step.
        verify: The time of the target's verification of γ + 1 tokens.
        target_step: The time of one step of the target alone.
        draft_length: γ, the drafted tokens per round.
    """
    return block_efficiency * target_step / (draft_step * draft_length + verify)


def round_tokens_per_second(
    tokens: float, draft_step_ms: float, verify_ms: float, overhead_ms: float, draft_length: float
) -> float:
    """Returns the tokens a second of rounds that draft γ tokens and verify them.

    After a draft that was accepted whole, a drafter with a cache of its own reads two tokens; that is left out here.

    Args:
        tokens: The tokens gained per round: τ, or N + 1 where N accepted tokens are forced.
        draft_step_ms: The time of one draft step.
        verify_ms: The time of the verification.
        overhead_ms: The rest of a round.
        draft_length: γ.
    """
    return 1e3 * tokens / (draft_length * draft_step_ms + verify_ms + overhead_ms)


def _acceptance(rounds: list[Round]) -> tuple[float, ...]:
    shares = []
    for position in range(max((entry.drafted for entry in rounds), default=0)):
        tried = [entry for entry in rounds if entry.drafted > position]
        shares.append(sum(entry.accepted > position for entry in tried) / len(tried))
    return tuple(shares)
