"""Checks that speculation does not change the distribution of sampled tokens.

Every token after a generation's first went through the acceptance rule. The distribution p that it should have follows
from the target's logits after the tokens before it, so `uniformity` can test all tokens at once.

Two tests differ in the order in which tokens divide the interval. In the first, tokens that the drafter lacks come
first and those that it overrates last, by q/p: a rule that favours what the drafter proposes, or what it cannot
propose, moves points to one side. In the second, tokens come by descending p: it finds a rule that makes the
distribution too sharp or too flat.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.decoder import SpeculativeDecoder
from runtime.verification import chi_square
from runtime.verification.sampled_points import Point, sampled_points
from runtime.verification.uniformity import BINS, FREEDOM, p_value_of, statistic_of

ALPHA = 1e-3  # the chance of a false alarm, all settings together
POWER = 0.99  # the chance of finding what `SettingReport.detectable` names
DRAWS = 2000  # tokens tested for each setting
SETTINGS = (
    SamplingParams(1.0),
    SamplingParams(1.5),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(1.0, top_k=40, top_p=0.95),
)


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
        points: list[Point] = []
        for point in sampled_points(decoder, decoder.drafter, prompts, params, draws):
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


def _report(params: SamplingParams, points: Sequence[Point], limit: float) -> SettingReport:
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
