"""Whether speculation changed the law of sampled tokens: a chi-square test against the target's own distribution.

Every token after a generation's first went through the rule, and what it should have been distributed as, p, is known:
the target's logits after the tokens before it give it. So p is cut into [0, 1) token by token, and a point is drawn in
the part of the token that came out: under p it is uniform, whatever p is, and independent of all others (Rosenblatt
1952). Points of all positions, prompts and seeds fall into BINS equal bins and are tested at once.

The tokens are cut in by q/p, those that the drafter lacks first and those that it overrates last: a rule that favours
what the drafter proposes, or what it cannot propose, moves points to one side. A second test cuts them in by descending
p: it sees a rule that is too sharp or too flat.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.decoder import SpeculativeDecoder
from runtime.logit_rules import make_logit_rules, ruled_rows
from runtime.pair import Auto, resolve_draft_length
from runtime.sampling import distribution
from runtime.verification import chi_square
from runtime.verification.teacher_forcing import GivenText, teacher_forced_drafts, teacher_forced_logits

ALPHA = 1e-3  # the chance of a false alarm, all settings together
POWER = 0.99
BINS = 17  # an odd number: then the chi-square's tail is a finite sum
DRAWS = 2000
SETTINGS = (
    SamplingParams(1.0),
    SamplingParams(1.5),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(1.0, top_k=40, top_p=0.95),
)
_NEW_TOKENS = 33  # of each generation; the first is not drafted
_FREEDOM = BINS - 1


@dataclass(frozen=True, slots=True)
class SettingReport:
    """The test of one way of sampling.

    Attributes:
        temperature: See `SamplingParams`, as for the next three.
        top_k: The most likely tokens that may be drawn; 0 for all.
        top_p: The probability that the drawn tokens must add up to.
        min_p: The smallest share of the largest probability.
        draws: Tokens tested.
        statistics: Pearson's chi-square with tokens ordered by q/p, and with tokens ordered by p.
        p_value: The p-value of the larger statistic, doubled because the larger one was chosen.
        missed_mass: The mean probability that the target gives to tokens which the drafter cannot propose.
        impossible: Tokens that were drawn although the target gives them probability zero; rounding at the edge of
            top-k and top-p is allowed for.
        limit: A p_value below it is a failure.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    draws: int
    statistics: tuple[float, float]
    p_value: float
    missed_mass: float
    impossible: int
    limit: float

    @property
    def passed(self) -> bool:
        return self.p_value >= self.limit and not self.impossible

    @property
    def detectable(self) -> float:
        """A total variation between the points' law and the uniform one that is found with a probability of POWER.

        A total variation of d makes a noncentrality of 4·d² a draw at least, whatever its shape.
        """
        return math.sqrt(chi_square.noncentrality_for(POWER, self.limit / 2, _FREEDOM) / (4 * self.draws))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "detectable": self.detectable}


@dataclass(frozen=True, slots=True)
class SamplingReport:
    """The tests of all settings. Each is tested at ALPHA over their number (Bonferroni).

    Attributes:
        settings: The test of each setting.
        draft_length: The longest γ.
    """

    settings: tuple[SettingReport, ...]
    draft_length: int

    @property
    def passed(self) -> bool:
        return all(setting.passed for setting in self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`."""
        return asdict(self) | {"settings": [each.to_dict() for each in self.settings], "passed": self.passed}


@dataclass(frozen=True, slots=True)
class _Point:
    """One tested token.

    Attributes:
        at: Its points in [0, 1], in the order by q/p and in that by p.
        missed: The probability that the target gives to tokens which the drafter lacks.
        impossible: The target gives it probability zero.
    """

    at: tuple[float, float]
    missed: float
    impossible: bool


def verify_sampling(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingParams] = SETTINGS,
    *,
    draws: int = DRAWS,
    progress: Callable[[int, int], None] | None = None,
) -> SamplingReport:
    """Sample with target and drafter until `draws` tokens are tested, for each of `settings`.

    The first draft has 1 token, the next 2, and so on up to γ, and then 1 again. With γ alone the token after a draft
    that is accepted whole would hardly be tested, because long drafts seldom are. With an adaptive draft length, drafts
    have 1 to 4 tokens first, then the decoder's own lengths, prompt lookup included.

    Args:
        decoder: Target and drafter.
        prompts: Token ids, taken in turn.
        settings: Ways of sampling. The seed of a setting is that of its first generation; later ones count up from it.
        draws: Tokens to test for each setting.
        progress: Called with the number of tokens tested and the number of all.

    Raises:
        VocabtrimError: There is no drafter or no prompt, the draws are too few, or a setting is greedy.
    """
    if decoder.drafter is None or not prompts or not settings or draws < 5 * BINS:
        raise VocabtrimError(f"a test of sampling needs a drafter, a prompt and at least {5 * BINS} draws")
    if any(params.is_greedy for params in settings):
        raise VocabtrimError("a test of sampling needs temperatures above 0: greedy output is compared token by token")
    reports = []
    for index, params in enumerate(settings):
        points: list[_Point] = []
        for point in _points(decoder, decoder.drafter, prompts, params, draws):
            points.append(point)
            if progress:
                progress(index * draws + len(points), len(settings) * draws)
            if len(points) == draws:
                break
        reports.append(_report(params, points, ALPHA / len(settings)))
    return SamplingReport(tuple(reports), decoder.draft_length)


def point_of(token: int, p: NDArray[np.float32], q: NDArray[np.float32], uniform: float) -> float:
    """Map a token to [0, 1] so that tokens drawn from p are uniform there.

    The interval is divided by p, with tokens in the order of ascending q/p, then of descending p, then of their ids.

    Args:
        token: The token id.
        p: float32[n] over token ids, the distribution that the token should have.
        q: float32[n] over token ids, the drafter's distribution.
        uniform: Where in the token's own part of the interval, 0 to 1.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(p > 0, q / p, np.inf)
    same = ratio == ratio[token]
    before = (ratio < ratio[token]) | (same & (p > p[token]))
    before[:token] |= (same & (p == p[token]))[:token]
    return min(1.0, float(p[before].sum(dtype=np.float64)) + uniform * float(p[token]))


def statistic_of(points: Sequence[float]) -> float:
    """Pearson's chi-square of `points` in [0, 1] against the uniform law."""
    counts = np.bincount(np.minimum((np.asarray(points) * BINS).astype(np.int64), BINS - 1), minlength=BINS)
    expected = len(points) / BINS
    return float(((counts - expected) ** 2).sum() / expected)


def _points(
    decoder: SpeculativeDecoder, drafter: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, draws: int
) -> Iterator[_Point]:
    """The points of as many generations as it takes. Raises `VocabtrimError` where they end too soon to test much."""
    first = params.seed or 0
    longest = resolve_draft_length(decoder.target, drafter, None if decoder.length.adapts else decoder.draft_length)
    lengths: list[int | Auto] = [*range(1, longest + 1)]
    if decoder.length.adapts:
        lengths.append("auto")
    rng = np.random.default_rng([0xD1CE, first])  # not the generations' own numbers
    for run in range(20 + 4 * draws // _NEW_TOKENS):
        prompt = prompts[run % len(prompts)]
        drawn = replace(params, seed=first + run)
        drafting = SpeculativeDecoder(decoder.target, drafter, draft_length=lengths[run % len(lengths)])
        tokens = drafting.generate(prompt, max_new_tokens=_NEW_TOKENS, sampling=drawn).token_ids
        rules = make_logit_rules(params, decoder.target.manifest, prompt)
        text = GivenText(prompt, tokens)
        rows = ruled_rows(teacher_forced_logits(decoder.target, text), tokens, rules)
        drafts = teacher_forced_drafts(decoder.target, drafter, text)
        theirs = ruled_rows(drafts, tokens, rules, first=1) if len(drafts) else drafts
        for index, (token, row, their_row) in enumerate(zip(tokens[1:], rows[1:], theirs, strict=True)):
            p = distribution(row[None], params)[0]
            drafted = (
                np.zeros_like(their_row) if np.isneginf(their_row).all() else distribution(their_row[None], params)[0]
            )
            q = _resized(drafted, len(p))
            impossible = bool(p[token] == 0 and distribution(row[None], _wider(params))[0][token] == 0)
            uniform = rng.random()
            at = point_of(token, p, q, uniform), point_of(token, p, np.ones_like(p), uniform)
            lacking = ~_resized(drafts[index] > -np.inf, len(p))
            yield _Point(at, float(p[lacking].sum()), impossible)
    raise VocabtrimError("these prompts end after few tokens: give others, or fewer --draws")


def _resized(values: NDArray[Any], width: int) -> NDArray[Any]:
    """The first `width` of `values`, filled up with zeros: one of the two models may lack the last token ids."""
    return np.pad(values[:width], (0, max(0, width - len(values))))


def _wider(params: SamplingParams) -> SamplingParams:
    """`params` that keep the tokens which rounding may push over the edge of top-k, top-p or min-p as well."""
    return replace(
        params, top_k=params.top_k and params.top_k + 1, top_p=min(1.0, params.top_p + 1e-3), min_p=params.min_p * 0.999
    )


def _report(params: SamplingParams, points: Sequence[_Point], limit: float) -> SettingReport:
    first, second = (statistic_of([point.at[order] for point in points]) for order in (0, 1))
    return SettingReport(
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        len(points),
        (first, second),
        min(1.0, 2 * chi_square.survival(max(first, second), _FREEDOM)),
        float(np.mean([point.missed for point in points])),
        sum(point.impossible for point in points),
        limit,
    )
