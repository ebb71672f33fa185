"""Samples texts with target and drafter, and maps each tested token to points that `uniformity` tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from runtime.verification.teacher_forcing import GivenText, teacher_forced_drafts, teacher_forced_logits
from runtime.verification.uniformity import point_of

_NEW_TOKENS = 33  # new tokens of each generation; the first is not drafted


@dataclass(frozen=True, slots=True)
class Point:
    """One tested token.

    Attributes:
        at: Its points in [0, 1], in the order by q/p and in that by p.
        missed: The probability that the target gives to tokens which the drafter lacks.
        impossible: The target gives it probability zero.
    """

    at: tuple[float, float]
    missed: float
    impossible: bool


def sampled_points(
    decoder: SpeculativeDecoder, drafter: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, draws: int
) -> Iterator[Point]:
    """Generate again and again, and yield a point for each token that was drafted or follows a draft.

    Args:
        decoder: Has the target, and the draft length up to which every length is tried.
        drafter: The drafter.
        prompts: Token ids of each prompt; they take turns.
        params: The settings to sample with; each generation has a seed of its own, from `params.seed` on.
        draws: The points that the caller takes.

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
) -> Iterator[Point]:
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
        yield Point(at, float(p[lacking].sum()), impossible)


def _resized(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Returns the first `width` of `values`, padded with zeros: one of the two models may lack the last token ids."""
    return np.pad(values[:width], (0, max(0, width - len(values))))


def _wider(params: SamplingParams) -> SamplingParams:
    """Returns `params` that also keep the tokens which rounding may push over the edge of top-k, top-p or min-p."""
    return replace(
        params, top_k=params.top_k and params.top_k + 1, top_p=min(1.0, params.top_p + 1e-3), min_p=params.min_p * 0.999
    )
