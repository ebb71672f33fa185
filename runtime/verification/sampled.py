"""Checks that speculation does not change the distribution of sampled tokens.

Every token after a generation's first went through the acceptance rule. The distribution p that it should have follows
from the target's logits after the tokens before it, so `uniformity` can test all tokens at once.

Two tests differ in the order in which tokens divide the interval. In the first, tokens that the drafter lacks come
first and those that it overrates last, by q/p: a rule that favours what the drafter proposes, or what it cannot
propose, moves points to one side. In the second, tokens come by descending p: it finds a rule that makes the
distribution too sharp or too flat.
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
from runtime.verification.uniformity import BINS, FREEDOM, p_value_of, point_of, statistic_of

ALPHA = 1e-3  # the chance of a false alarm, all settings together
POWER = 0.99  # the chance of finding what `SettingReport.detectable` names
DRAWS = 2000  # tokens tested for each setting
SETTINGS = (
    SamplingParams(1.0),
    SamplingParams(1.5),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(1.0, top_k=40, top_p=0.95),
)
_NEW_TOKENS = 33  # new tokens of each generation; the first is not drafted


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
        """The tokens follow the target's distribution, as far as the test can tell."""
        return self.p_value >= self.limit and not self.impossible

    @property
    def detectable(self) -> float:
        """The total variation between the points' distribution and the uniform one that is found with chance POWER.

        A total variation of d gives the chi-square statistic a noncentrality of at least 4·d² for each draw.
        """
        return math.sqrt(chi_square.noncentrality_for(POWER, self.limit / 2, FREEDOM) / (4 * self.draws))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`."""
        return asdict(self) | {"passed": self.passed, "detectable": self.detectable}


@dataclass(frozen=True, slots=True)
class SamplingReport:
    """The tests of all settings. Each has the level ALPHA divided by their number (Bonferroni).

    Attributes:
        settings: The test of each setting.
        draft_length: The longest γ.
    """

    settings: tuple[SettingReport, ...]
    draft_length: int

    @property
    def passed(self) -> bool:
        """The test of every setting passed."""
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
    that is accepted whole would hardly be tested, because long drafts rarely are. With an adaptive draft length, drafts
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
    check_test(settings, draws)
    if decoder.drafter is None or not prompts or not settings:
        raise VocabtrimError("a test of sampling needs a drafter, a prompt and a way of sampling")
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


def check_test(settings: Sequence[SamplingParams], draws: int) -> None:
    """Check the arguments of `verify_sampling` before any work.

    Raises:
        VocabtrimError: The draws are too few, or a setting is greedy.
    """
    if draws < 5 * BINS:
        raise VocabtrimError(f"a test of sampling needs at least {5 * BINS} draws for each setting, not {draws}")
    if any(params.is_greedy for params in settings):
        raise VocabtrimError("a test of sampling needs temperatures above 0: greedy output is compared token by token")


def _points(
    decoder: SpeculativeDecoder, drafter: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, draws: int
) -> Iterator[_Point]:
    """Generate again and again, and yield a point for each token that was drafted or follows a draft.

    Raises:
        VocabtrimError: The generations end too soon to give `draws` points.
    """
    first = params.seed or 0
    longest = resolve_draft_length(decoder.target, drafter, None if decoder.length.adapts else decoder.draft_length)
    lengths: list[int | Auto] = [*range(1, longest + 1)]
    if decoder.length.adapts:
        lengths.append("auto")
    rng = np.random.default_rng([0xD1CE, first])  # independent of the numbers that the generations draw
    for run in range(20 + 4 * draws // _NEW_TOKENS):
        prompt = prompts[run % len(prompts)]
        drawn = replace(params, seed=first + run)
        drafting = SpeculativeDecoder(decoder.target, drafter, draft_length=lengths[run % len(lengths)])
        tokens = drafting.generate(prompt, max_new_tokens=_NEW_TOKENS, sampling=drawn).token_ids
        yield from _points_along(decoder.target, drafter, GivenText(prompt, tokens), params, rng)
    raise VocabtrimError("these prompts end after few tokens: give others, or fewer --draws")


def _points_along(
    target: Engine, drafter: Engine, text: GivenText, params: SamplingParams, rng: np.random.Generator
) -> Iterator[_Point]:
    """Yield the points of one generation's tokens, but for the first, which is never drafted.

    Args:
        target: The target's engine.
        drafter: The drafter's engine.
        text: The prompt and the tokens that were generated.
        params: The settings that they were sampled with.
        rng: Draws where each point lies within its token's part of the interval.
    """
    tokens = text.tokens
    rules = make_logit_rules(params, target.manifest, text.prompt)
    rows = ruled_rows(teacher_forced_logits(target, text), tokens, rules)
    drafts = teacher_forced_drafts(target, drafter, text)
    ruled_drafts = ruled_rows(drafts, tokens, rules, first=1) if len(drafts) else drafts
    for index, (token, row, draft_row) in enumerate(zip(tokens[1:], rows[1:], ruled_drafts, strict=True)):
        p = distribution(row[None], params)[0]
        can_draft = not np.isneginf(draft_row).all()
        q = distribution(draft_row[None], params)[0] if can_draft else np.zeros_like(draft_row)
        impossible = bool(p[token] == 0 and distribution(row[None], _wider(params))[0][token] == 0)
        uniform = rng.random()
        at = point_of(token, p, _resized(q, len(p)), uniform), point_of(token, p, np.ones_like(p), uniform)
        lacking = ~_resized(drafts[index] > -np.inf, len(p))
        yield _Point(at, float(p[lacking].sum()), impossible)


def _resized(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Returns the first `width` of `values`, padded with zeros: one of the two models may lack the last token ids."""
    return np.pad(values[:width], (0, max(0, width - len(values))))


def _wider(params: SamplingParams) -> SamplingParams:
    """Returns `params` that also keep the tokens which rounding may push over the edge of top-k, top-p or min-p."""
    return replace(
        params, top_k=params.top_k and params.top_k + 1, top_p=min(1.0, params.top_p + 1e-3), min_p=params.min_p * 0.999
    )


def _report(params: SamplingParams, points: Sequence[_Point], limit: float) -> SettingReport:
    by_ratio, by_probability = ([point.at[order] for point in points] for order in (0, 1))
    statistics = statistic_of(by_ratio), statistic_of(by_probability)
    return SettingReport(
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        len(points),
        statistics,
        p_value_of(statistics),
        float(np.mean([point.missed for point in points])),
        sum(point.impossible for point in points),
        limit,
    )
