"""Whether speculation changed the output: every greedy token against what a reference predicts in its place."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

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
from runtime.verification.teacher_forcing import Predict, forced_logits, stepped_logits

EPSILON = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}  # from 1 to the next number
# Between two float32 runtimes a logit of SmolLM2, 30 layers, was off by 30 epsilons of the row's largest at most, the
# gap of two logits by twice that: 2 epsilons a layer. Twice as many are allowed.
ROUNDINGS_PER_LAYER = 4

Verdict = Literal["equal", "near-tie", "different"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A generated token that is not the reference's own choice after the very same tokens.

    position: its index among the new tokens. found, expected: token ids, of the generation and of the reference.
    gap: by how much the reference's logit of `expected` exceeds that of `found`. tolerance: what rounding explains.
    """

    position: int
    found: int
    expected: int
    gap: float
    tolerance: float

    @property
    def verdict(self) -> Verdict:
        return "near-tie" if self.gap <= self.tolerance else "different"  # a gap that is NaN is no tie


@dataclass(frozen=True, slots=True)
class PromptReport:
    """One generation. tokens: the new ones. ending: what is wrong with where it ended, None if nothing is.

    deviation: how far the reference's logits are from the engine's at most, in roundings (ε of the dtype times the
    row's largest logit); None where the engine is the reference.
    """

    tokens: int
    differences: tuple[Difference, ...]
    ending: str | None
    deviation: float | None

    @property
    def verdict(self) -> Verdict:
        verdicts = {difference.verdict for difference in self.differences}
        if self.ending or "different" in verdicts:
            return "different"
        return "near-tie" if verdicts else "equal"

    def to_dict(self) -> dict[str, Any]:
        differences = [asdict(each) | {"verdict": each.verdict} for each in self.differences]
        return asdict(self) | {"differences": differences, "verdict": self.verdict}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`prompts` in the order given. reference: what judged them."""

    prompts: tuple[PromptReport, ...]
    reference: str
    draft_length: int
    max_new_tokens: int

    @property
    def passed(self) -> bool:
        """No prompt is "different"."""
        return all(prompt.verdict != "different" for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
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
    """Generate greedily with target and drafter, then ask the reference what it would have chosen at every position.

    The reference reads the generated tokens themselves, so that one near-tie does not spoil what follows.
    sampling: greedy, with rules beside those of the target's bundle; all apply to the reference's logits as well.
    prompts: token ids. predict: another reference than the target's engine, by the name `reference`.
    progress: called with the prompts done and their number. Raises `VocabtrimError` for input that cannot run.
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
    return VerifyReport(tuple(reports), reference, decoder.draft_length, max_new_tokens)


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
    own, deviation = forced_logits(target, prompt, tokens), None
    if predict is None:
        found = differences(ruled_rows(own, tokens, rules), tokens, target.manifest)
        found = _reconsidered(target, prompt, tokens, rules, found)
    else:
        rows = predict(prompt, tokens)
        found = differences(ruled_rows(rows, tokens, rules), tokens, target.manifest)
        deviation = _deviation(own, rows, target.manifest)
    return PromptReport(len(tokens), tuple(found), _ending(result, len(prompt), max_new_tokens, target), deviation)


def differences(rows: NDArray[np.float32], tokens: Sequence[int], manifest: Manifest) -> list[Difference]:
    """Where `tokens` are not what is likeliest by `rows`, float32[len(tokens), columns], logits of the same positions.

    manifest: of the model that generated them: its dtype and depth say what rounding may explain.
    """
    chosen = rows.argmax(axis=1).tolist()
    return [
        _difference(index, token, row, manifest)
        for index, (token, best, row) in enumerate(zip(tokens, chosen, rows, strict=True))
        if token != best
    ]


def tolerance(row: NDArray[np.float32], manifest: Manifest) -> float:
    """A gap between two logits of `row`, float32[columns], that rounding explains.

    ROUNDINGS_PER_LAYER · layers · ε of the dtype · the largest logit's size.
    """
    scale = float(np.abs(row[np.isfinite(row)]).max(initial=0.0))
    return ROUNDINGS_PER_LAYER * manifest.num_layers * EPSILON[manifest.dtype] * scale


def _difference(index: int, token: int, row: NDArray[np.float32], manifest: Manifest) -> Difference:
    best = int(row.argmax())
    gap = float(row[best]) - float(row[token]) if token < len(row) else float("inf")
    return Difference(index, token, best, gap, tolerance(row, manifest))


def _reconsidered(
    target: Engine, prompt: Sequence[int], tokens: Sequence[int], rules: LogitRules | None, found: list[Difference]
) -> list[Difference]:
    """The same differences, each with the smaller gap of two calls: a token may come of a call on several or on one."""
    kinder = []
    for difference in reversed(found):
        rows = stepped_logits(target, prompt, tokens, difference.position)[None]
        row = ruled_rows(rows, tokens, rules, first=difference.position)[0]
        again = _difference(difference.position, difference.found, row, target.manifest)
        kinder.append(replace(difference, gap=min(difference.gap, again.gap)))
    return kinder[::-1]


def _deviation(own: NDArray[np.float32], rows: NDArray[np.float32], manifest: Manifest) -> float:
    width = min(own.shape[1], rows.shape[1])
    most = np.abs(own[:, :width] - rows[:, :width]).max(axis=1)
    return float((most / np.abs(rows).max(axis=1)).max()) / EPSILON[manifest.dtype]


def _ending(result: Generation, prompt_length: int, max_new_tokens: int, target: Engine) -> str | None:
    """What is wrong with where a generation ended: the first EOS ends it, else the tokens asked for or the context."""
    stops = [i for i, token in enumerate(result.token_ids) if token in target.manifest.eos_token_ids]
    last = len(result.token_ids) - 1
    if stops and stops[0] < last:
        return f"an EOS at position {stops[0]} did not end it"
    most = min(max_new_tokens, target.capacity - prompt_length + 1)  # the last one need not be cached
    if not stops and last + 1 != most:
        return f"it ended after {last + 1} of {most} tokens without an EOS"
    return None
