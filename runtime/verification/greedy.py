"""Checks that speculation does not change greedy output.

Every token is compared with what a reference predicts in its place, and with what the target alone chooses there, one
token at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.read import Manifest
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.decoder import SpeculativeDecoder
from runtime.logit_rules import LogitRules, make_logit_rules, ruled_rows
from runtime.loop import GREEDY
from runtime.stream import Generation
from runtime.verification.differences import EPSILON, Difference, Verdict, difference_at, differences
from runtime.verification.teacher_forcing import GivenText, Predict, stepped_logits, teacher_forced_logits

# Between calls on one token and on many, in float32, the logit that was off most was off by 18 epsilons for SmolLM2 and
# by 38 for random weights in 2 layers. Where inputs are rounded to 8 bits in between, it is off by 350,000 and more.
STEP_ROUNDINGS_PER_LAYER = 64


@dataclass(frozen=True, slots=True)
class PromptReport:
    """One generation. Deviations are in roundings: ε of the dtype times the largest logit of the row.

    Attributes:
        tokens: The new tokens.
        ending: The fault in the place where the generation ended; None if there is none.
        differences: Differences from the reference.
        target_only: Differences from the target without a drafter, one token a call, along the same text. Where there
            are none, that text is what the target alone generates.
        deviation: The largest distance of reference logits from the engine's; None where the engine is the reference.
        step_deviation: The distance of the logits of calls on one token from those of calls on many.
        step_limit: The step deviation that rounding explains. Beyond it the engine computes another model in a
            verification than in a single step.
    """

    tokens: int
    differences: tuple[Difference, ...]
    target_only: tuple[Difference, ...]
    ending: str | None
    deviation: float | None
    step_deviation: float
    step_limit: float

    @property
    def is_one_model(self) -> bool:
        """Calls on one token and on many give the same logits, to rounding."""
        return self.step_deviation <= self.step_limit  # NaN is not

    @property
    def verdict(self) -> Verdict:
        verdicts = {difference.verdict for difference in (*self.differences, *self.target_only)}
        if self.ending or not self.is_one_model or "different" in verdicts:
            return "different"
        return "near-tie" if verdicts else "equal"

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self) | {"is_one_model": self.is_one_model, "verdict": self.verdict}
        for name in ("differences", "target_only"):
            data[name] = [asdict(each) | {"verdict": each.verdict} for each in getattr(self, name)]
        return data


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        prompts: One report for each prompt, in the order given.
        reference: The name of what judged the tokens.
        is_independent: The reference is not the target's own engine, which cannot tell whether the target computes what
            its model does.
    """

    prompts: tuple[PromptReport, ...]
    reference: str
    is_independent: bool
    draft_length: int
    max_new_tokens: int

    @property
    def passed(self) -> bool:
        """True if no prompt's verdict is "different"."""
        return all(prompt.verdict != "different" for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`."""
        return asdict(self) | {"prompts": [prompt.to_dict() for prompt in self.prompts], "passed": self.passed}


def verify(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingParams = GREEDY,
    predict: Predict | None = None,
    reference: str = "the target's own engine",
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Generate greedily with a pair, and compare every token with the reference's and with the target's alone.

    Both read the generated tokens themselves, so that a near-tie does not change what is compared after it.

    Args:
        decoder: The target and the drafter.
        prompts: Token ids.
        max_new_tokens: The most tokens to generate for a prompt.
        predict: Another reference than the target's engine.
        reference: The name of that reference.
        sampling: Greedy, with rules that come on top of the target's own; all apply to the reference's logits as well.
        progress: Called with the prompts done and their number.

    Raises:
        VocabtrimError: The input cannot run.
    """
    if not prompts:
        raise VocabtrimError("there is nothing to verify: give at least one prompt")
    if not sampling.is_greedy:
        raise VocabtrimError("greedy output is compared token by token: give a temperature of 0")
    reports = []
    for done, prompt in enumerate(prompts, 1):
        reports.append(_verify_one(decoder, prompt, max_new_tokens, sampling, predict))
        if progress:
            progress(done, len(prompts))
    return VerifyReport(tuple(reports), reference, predict is not None, decoder.draft_length, max_new_tokens)


def _verify_one(
    decoder: SpeculativeDecoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParams,
    predict: Predict | None,
) -> PromptReport:
    target = decoder.target
    result = decoder.generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling)
    tokens = result.token_ids
    rules = make_logit_rules(sampling, target.manifest, prompt)
    text = GivenText(prompt, tokens)
    own = teacher_forced_logits(target, text)
    rows = own if predict is None else predict(text)
    target_only, step_deviation = _step_by_step(target, text, own, rules)
    return PromptReport(
        len(tokens),
        tuple(differences(ruled_rows(rows, tokens, rules), tokens, target.manifest)),
        target_only,
        _ending(result, len(prompt), max_new_tokens, target),
        None if predict is None else _deviation(own, rows, target.manifest),
        step_deviation,
        STEP_ROUNDINGS_PER_LAYER * target.manifest.num_layers,
    )


def _step_by_step(
    target: Engine, text: GivenText, blocks: NDArray[np.float32], rules: LogitRules | None
) -> tuple[tuple[Difference, ...], float]:
    """Returns where calls on one token choose otherwise, and how far their logits are from `blocks`, in roundings."""
    found: list[Difference] = []
    deviations = []
    tokens = text.tokens
    for index, row in enumerate(stepped_logits(target, text)):
        ruled = ruled_rows(row[None], tokens, rules, first=index)[0]
        if ruled.argmax() != tokens[index]:
            found.append(difference_at(index, tokens[index], ruled, target.manifest))
        deviations.append(_deviation(row[None], blocks[index : index + 1], target.manifest))
    return tuple(found), float(np.max(deviations))


def _deviation(own: NDArray[np.float32], rows: NDArray[np.float32], manifest: Manifest) -> float:
    width = min(own.shape[1], rows.shape[1])
    a, b = own[:, :width], rows[:, :width]
    off = np.abs(np.subtract(a, b, out=np.zeros_like(a), where=a != b))  # an infinite logit may be the same in both
    most, scale = off.max(axis=1), np.abs(np.where(np.isfinite(rows), rows, 0)).max(axis=1)
    shares = np.divide(most, scale, out=np.zeros_like(most), where=most != 0)
    return float(shares.max()) / EPSILON[manifest.dtype]


def _ending(result: Generation, prompt_length: int, max_new_tokens: int, target: Engine) -> str | None:
    """Returns what is wrong with the place where a generation ended; None if nothing is.

    It must end at the first EOS, else at the number of tokens asked for or at the end of the context.
    """
    stops = [i for i, token in enumerate(result.token_ids) if token in target.manifest.eos_token_ids]
    last = len(result.token_ids) - 1
    if stops and stops[0] < last:
        return f"an EOS at position {stops[0]} did not end it"
    most = min(max_new_tokens, target.capacity - prompt_length + 1)  # the last one need not be cached
    if not stops and last + 1 != most:
        return f"it ended after {last + 1} of {most} tokens without an EOS"
    return None
