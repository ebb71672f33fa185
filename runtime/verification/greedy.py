"""Whether speculation changed the output: every greedy token against what a reference predicts in its place, and
against what the target alone chooses there, one token at a time."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
# Between calls on one token and on many, in float32, the logit that was off most was off by 18 epsilons for SmolLM2 and
# by 38 for random weights in 2 layers. Where inputs are rounded to 8 bits in between, it is off by 350,000 and more.
STEP_ROUNDINGS_PER_LAYER = 64

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

    differences: from the reference. target_only: from the target without a drafter, one token a call, along the same
    text; where there are none, that text is what the target alone generates.
    deviation: how far the reference's logits are from the engine's at most, in roundings (ε of the dtype times the
    row's largest logit); None where the engine is the reference.
    step_deviation: how far the logits of calls on one token are from those of calls on many, in roundings;
    step_limit: what rounding explains. Beyond it the engine is another model in a verification than in a single step.
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
    """`prompts` in the order given. reference: what judged them. is_independent: it is not the target's own engine,
    which cannot tell whether the target computes what its model does."""

    prompts: tuple[PromptReport, ...]
    reference: str
    is_independent: bool
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
    """Generate greedily with target and drafter, then ask what would have been chosen at every position: the reference,
    and the target alone, one token at a time.

    Both read the generated tokens themselves, so that one near-tie does not spoil what follows.
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
    own = forced_logits(target, prompt, tokens)
    rows = own if predict is None else predict(prompt, tokens)
    target_only, step_deviation = _step_by_step(target, prompt, tokens, own, rules)
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
    target: Engine,
    prompt: Sequence[int],
    tokens: Sequence[int],
    blocks: NDArray[np.float32],
    rules: LogitRules | None,
) -> tuple[tuple[Difference, ...], float]:
    """What calls on one token choose otherwise, and how far their logits are from `blocks`, in roundings."""
    found: list[Difference] = []
    deviations = []
    for index, row in enumerate(stepped_logits(target, prompt, tokens)):
        ruled = ruled_rows(row[None], tokens, rules, first=index)[0]
        if ruled.argmax() != tokens[index]:
            found.append(difference_at(index, tokens[index], ruled, target.manifest))
        deviations.append(_deviation(row[None], blocks[index : index + 1], target.manifest))
    return tuple(found), float(np.max(deviations))


def differences(rows: NDArray[np.float32], tokens: Sequence[int], manifest: Manifest) -> list[Difference]:
    """Where `tokens` are not what is likeliest by `rows`, float32[len(tokens), columns], logits of the same positions.

    manifest: of the model that generated them: its dtype and depth say what rounding may explain.
    """
    chosen = rows.argmax(axis=1).tolist()
    return [
        difference_at(index, token, row, manifest)
        for index, (token, best, row) in enumerate(zip(tokens, chosen, rows, strict=True))
        if token != best
    ]


def tolerance(row: NDArray[np.float32], manifest: Manifest) -> float:
    """A gap between two logits of `row`, float32[columns], that rounding explains.

    ROUNDINGS_PER_LAYER · layers · ε of the dtype · the largest logit's size.
    """
    scale = float(np.abs(row[np.isfinite(row)]).max(initial=0.0))
    return ROUNDINGS_PER_LAYER * manifest.num_layers * EPSILON[manifest.dtype] * scale


def difference_at(index: int, token: int, row: NDArray[np.float32], manifest: Manifest) -> Difference:
    best = int(row.argmax())
    gap = float(row[best]) - float(row[token]) if token < len(row) else float("inf")
    return Difference(index, token, best, gap, tolerance(row, manifest))


def _deviation(own: NDArray[np.float32], rows: NDArray[np.float32], manifest: Manifest) -> float:
    width = min(own.shape[1], rows.shape[1])
    a, b = own[:, :width], rows[:, :width]
    off = np.abs(np.subtract(a, b, out=np.zeros_like(a), where=a != b))  # an infinite logit may be the same in both
    most, scale = off.max(axis=1), np.abs(np.where(np.isfinite(rows), rows, 0)).max(axis=1)
    shares = np.divide(most, scale, out=np.zeros_like(most), where=most != 0)
    return float(shares.max()) / EPSILON[manifest.dtype]


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
