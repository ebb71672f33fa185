"""The K and the slots with the most expected tokens per second on held-out texts. All functions are pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import harmonic_mean

import numpy as np
from numpy.typing import NDArray

from vocabtrim_export.head_choice.replay import NEVER_KEPT, Text, right_tokens, rounds_of
from vocabtrim_export.head_choice.steps import StepTimes

SLOTS = 512  # tried in addition to none
_SMALLEST_K = 2048
_DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_HOST_SECONDS = 3e-4  # time of a round outside the engines
_NOT_BELOW = 0.99  # the least share of the full head's tokens/s on every domain


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected speed of one domain's texts.

    Attributes:
        domain: The domain that the prompts come from: a name that the user gave, or a file.
        texts: The number of its texts.
        draft_length: The best γ; 0 where the target alone is faster.
        block_efficiency: Tokens per round with it.
        tokens_per_second: Without prefills.
        speedup: Over the target alone.
    """

    domain: str
    texts: int
    draft_length: int
    block_efficiency: float
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True, slots=True)
class HeadCandidate:
    """One K and number of slots.

    Attributes:
        k: Rows of the head.
        slots: In-context slots.
        domains: The expected speed of each domain.
    """

    k: int
    slots: int
    domains: tuple[Expected, ...]

    @property
    def speedup(self) -> float:
        """The speed-up over the target alone, the harmonic mean of all domains, each with the same weight."""
        return harmonic_mean([domain.speedup for domain in self.domains])


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen head.

    Attributes:
        best: The chosen candidate.
        full: The full head, for comparison.
        candidates: All candidates, the fastest first.
    """

    best: HeadCandidate
    full: HeadCandidate
    candidates: tuple[HeadCandidate, ...]

    def reasons(self) -> tuple[str, ...]:
        """Returns one line for the choice, and one for each domain, first those that the trim helps least."""
        best, full = self.best, self.full
        slots = f" and {best.slots} slots" if best.slots else ""
        rows, than = f"{best.k} rows{slots}", f", full head {full.speedup:.2f}×"
        if best.k == full.k:
            rows, than = f"all {full.k} rows, since no trim is faster", ""
        lines = [f"--k auto chose {rows}: expected {best.speedup:.2f}× the target alone{than}"]
        pairs = sorted(zip(best.domains, full.domains, strict=True), key=lambda pair: pair[0].speedup / pair[1].speedup)
        for mine, its in pairs:
            speed = f"{mine.speedup:.2f}× with γ = {mine.draft_length}"
            if not mine.draft_length:
                speed = "speculation does not pay, the target alone is faster than drafts of any length"
            lines.append(
                f"{mine.domain}: {speed}, full head {its.speedup:.2f}×; "
                f"block efficiency {mine.block_efficiency:.2f} and {its.block_efficiency:.2f} on {mine.texts} texts"
            )
        return tuple(lines)


def choose(
    texts: Sequence[Text], order: NDArray[np.int64], times: StepTimes, rows: int, slots: Sequence[int]
) -> Choice:
    """Choose among powers of two and the full head, each with every number of slots.

    The fastest of the candidates that are at least as fast as the full head on every domain is chosen.

    Args:
        texts: Held-out prompts with the target's own continuations.
        order: int64[n], the ids that can be kept, in the order in which they are kept.
        times: The step times of the pair with the full head.
        rows: Rows of the full head.
        slots: Numbers of slots to try.
    """
    largest = max(rows, *(max(*text.prompt, text.tokens.max()) for text in texts), order.max())
    row_of = np.full(int(largest) + 1, NEVER_KEPT)
    row_of[order] = np.arange(len(order))
    trims = [k for k in (_SMALLEST_K << i for i in range(32)) if k < len(order)]
    pairs = [(k, m) for k in trims for m in slots if m < len(order) - k]
    full = _candidate(texts, row_of, times, rows, rows, 0)
    candidates = [full, *(_candidate(texts, row_of, times, rows, k, m) for k, m in pairs)]
    candidates.sort(key=lambda each: (-each.speedup, each.k))
    return Choice(next(each for each in candidates if _pays(each, full)), full, tuple(candidates))


def _pays(candidate: HeadCandidate, full: HeadCandidate) -> bool:
    pairs = zip(candidate.domains, full.domains, strict=True)
    return candidate.speedup >= full.speedup and all(a.speedup >= _NOT_BELOW * b.speedup for a, b in pairs)


def _candidate(
    texts: Sequence[Text], row_of: NDArray[np.int64], times: StepTimes, rows: int, k: int, slots: int
) -> HeadCandidate:
    step = times.draft(rows - k, slots)
    domains = []
    for domain in dict.fromkeys(text.domain for text in texts):
        right = [right_tokens(text, row_of, k, slots) for text in texts if text.domain == domain]
        domains.append(_expected(domain, right, step, times))
    return HeadCandidate(k, slots, tuple(domains))


def _expected(domain: str, right: Sequence[NDArray[np.bool_]], step: float, times: StepTimes) -> Expected:
    """Returns the expected speed of one domain with the best draft length."""
    tokens = sum(map(len, right))
    alone = times.verification(1) + _HOST_SECONDS
    best = 0, tokens, tokens * alone
    for length in _DRAFT_LENGTHS:
        if length >= max(times.verify):
            break
        rounds = sum(rounds_of(each, length) for each in right)
        seconds = rounds * (length * step + times.verification(length + 1) + _HOST_SECONDS)
        if seconds < best[2]:
            best = length, rounds, seconds
    length, rounds, seconds = best
    return Expected(domain, len(right), length, tokens / rounds, tokens / seconds, tokens * alone / seconds)
