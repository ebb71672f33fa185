"""Chooses the drafter and the draft length that are fastest here, from measured steps. All functions are pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.bundle.manifest import Manifest
from runtime.measure.expert_reads import ExpertReads

# Thresholds of the reasons that a plan states. They change no choice.
_COMPUTE_BOUND = 0.5  # of a step: what each further verified token costs beyond the bytes that it reads
_MORE_EXPERTS = 1.1  # of a step's weights: what a verification of a mixture reads
_SMALL_HEAD = 0.25  # of the bytes of a draft step
_LOW_ACCEPTANCE = 0.5  # of the first drafted tokens
_LOST_ACCEPTANCE = 0.05  # of the first drafted tokens, by a trim
_DEAR_DRAFT = 0.5  # of a target step


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """Medians of full rounds, in ms: drafting γ tokens, verifying γ + 1, and the whole round."""

    draft_length: int
    draft_step_ms: float
    verify_ms: float
    round_ms: float


@dataclass(frozen=True, slots=True)
class DrafterTimes:
    """One drafter as measured.

    Attributes:
        name: The drafter's name.
        head_rows: The rows of its LM head, K where `is_trimmed`.
        is_trimmed: Its head is trimmed.
        head_share: The head's share of the bytes that a draft step reads.
        acceptance: See `Stats`, at the largest γ.
        rounds: One entry for each γ.
    """

    name: str
    head_rows: int
    is_trimmed: bool
    head_share: float
    acceptance: tuple[float, ...]
    rounds: tuple[RoundTimes, ...]


@dataclass(frozen=True, slots=True)
class PlanCandidate:
    """The expected speed of a drafter at one γ, without prefills.

    Attributes:
        drafter: The drafter's name.
        head_rows: The rows of its LM head.
        is_trimmed: Its head is trimmed.
        draft_length: γ.
        block_efficiency: Tokens per round.
        tokens_per_second: Tokens per second.
        speedup: Over the target alone.
    """

    drafter: str
    head_rows: int
    is_trimmed: bool
    draft_length: int
    block_efficiency: float
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision.

    Attributes:
        candidates: Every drafter at every γ, the fastest first.
        target_tokens_per_second: The speed of the target alone.
        trimming_gain: The best trimmed drafter's tokens/s over the best full one's; None where either is missing.
        reasons: The limits of the gain, one sentence each; empty where nothing stands out.
    """

    candidates: tuple[PlanCandidate, ...]
    target_tokens_per_second: float
    trimming_gain: float | None
    reasons: tuple[str, ...]

    @property
    def best(self) -> PlanCandidate:
        """The fastest drafter, with its γ."""
        return self.candidates[0]

    @property
    def speculation_pays(self) -> bool:
        """Whether the fastest drafter is faster than the target alone."""
        return self.best.speedup > 1

    @property
    def trimming_pays(self) -> bool | None:
        """None where there is nothing to compare."""
        return None if self.trimming_gain is None else self.trimming_gain > 1

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`."""
        verdicts = {"speculation_pays": self.speculation_pays, "trimming_pays": self.trimming_pays}
        return verdicts | {"best": asdict(self.best)} | asdict(self)


def plan(target_step_ms: float, drafters: Sequence[DrafterTimes], target: Manifest | None = None) -> Plan:
    """Choose the drafter and γ with the most expected tokens a round over the round's measured time.

    Args:
        target_step_ms: A whole round of the target alone, in ms.
        drafters: At least one, each with a round.
        target: The target, whose experts may be a reason; None for a dense one.
    """
    candidates = sorted(
        (_candidate(target_step_ms, drafter, times) for drafter in drafters for times in drafter.rounds),
        key=lambda c: (-c.tokens_per_second, c.draft_length, c.head_rows),
    )
    best = candidates[0]
    gain = _trimming_gain(candidates)
    chosen = next(drafter for drafter in drafters if drafter.name == best.drafter)
    times = next(times for times in chosen.rounds if times.draft_length == best.draft_length)
    reads = ExpertReads.of(target, best.draft_length + 1) if target else None
    reasons = [*_against_speculation(target_step_ms, chosen, times, reads), *_against_trimming(drafters, gain)]
    return Plan(tuple(candidates), 1e3 / target_step_ms, gain, tuple(reasons))


def expected_block_efficiency(acceptance: Sequence[float], draft_length: int) -> float:
    """Returns τ at γ = `draft_length` from the acceptance by position of drafts that are at least as long.

    A drafted token is accepted if all before it are, which a longer draft does not change: τ = 1 + Σ acceptance[i], i <
    γ.
    """
    return 1 + sum(acceptance[:draft_length])


def _candidate(target_step_ms: float, drafter: DrafterTimes, times: RoundTimes) -> PlanCandidate:
    tau = expected_block_efficiency(drafter.acceptance, times.draft_length)
    return PlanCandidate(
        drafter.name,
        drafter.head_rows,
        drafter.is_trimmed,
        times.draft_length,
        tau,
        tokens_per_second=1e3 * tau / times.round_ms,
        speedup=tau * target_step_ms / times.round_ms,
    )


def _trimming_gain(candidates: Sequence[PlanCandidate]) -> float | None:
    """Returns the best trimmed drafter's speed over the best full one's; None where either is missing.

    Args:
        candidates: All candidates, the fastest first.
    """
    trimmed = next((c for c in candidates if c.is_trimmed), None)
    full = next((c for c in candidates if not c.is_trimmed), None)
    return trimmed.tokens_per_second / full.tokens_per_second if trimmed and full else None


def _against_speculation(
    target_step_ms: float, drafter: DrafterTimes, times: RoundTimes, reads: ExpertReads | None
) -> list[str]:
    """Returns the reasons why even the best candidate is not faster, in words."""
    reasons = []
    width, cost = times.draft_length + 1, times.verify_ms / target_step_ms
    weights = reads.weights if reads else 1.0
    if reads and weights > _MORE_EXPERTS:
        reasons.append(f"the target is a mixture of experts: {reads}; a verification takes {cost:.1f} of its steps")
    if (cost - weights) / times.draft_length > _COMPUTE_BOUND:
        reasons.append(
            f"verifying {width} tokens costs {cost:.1f} steps of the target: it is bound by compute here, not by "
            "memory; a target of a wider dtype, or another device, gains more"
        )
    if times.draft_step_ms / target_step_ms > _DEAR_DRAFT:
        reasons.append(
            f"a draft step takes {times.draft_step_ms / target_step_ms:.0%} of a step of the target: "
            "quantise the drafter, or take a smaller one"
        )
    if drafter.acceptance and drafter.acceptance[0] < _LOW_ACCEPTANCE:
        reasons.append(
            f"only {drafter.acceptance[0]:.0%} of the first drafted tokens are accepted: "
            "calibrate on prompts like these, keep more rows, or take another drafter"
        )
    return reasons


def _against_trimming(drafters: Sequence[DrafterTimes], gain: float | None) -> list[str]:
    """Returns the reasons why a trim gains little or loses; none where there is nothing to compare."""
    full = [drafter for drafter in drafters if not drafter.is_trimmed]
    trimmed = [drafter for drafter in drafters if drafter.is_trimmed]
    reasons = []
    if full and full[0].head_share < _SMALL_HEAD:
        reasons.append(
            f"the full head is {full[0].head_share:.0%} of what a draft step reads: a trim saves at most that share"
        )
    if gain is not None and gain <= 1:
        closest = max(trimmed, key=lambda drafter: drafter.acceptance[:1])
        lost = full[0].acceptance[0] - closest.acceptance[0] if full[0].acceptance and closest.acceptance else 0.0
        if lost > _LOST_ACCEPTANCE:
            reasons.append(
                f"trimming to {closest.head_rows} rows loses {lost:.0%} of the first drafted tokens' acceptance: "
                "calibrate on more tokens, on prompts like these, or keep more rows"
            )
    return reasons
