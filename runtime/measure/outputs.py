"""Compares the outputs of a bench with those of the target alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from engines.base import Engine
from engines.sampling_params import SamplingParams
from runtime.logit_rules import make_logit_rules, ruled_rows
from runtime.loop import GREEDY
from runtime.measure.timing import TimedGeneration
from runtime.verification.differences import Difference, difference_at, tolerance
from runtime.verification.teacher_forcing import GivenText, stepped_logits


@dataclass(frozen=True, slots=True)
class OutputDifference(Difference):
    """A token that target-only decoding does not choose after the same tokens.

    `found` or `expected` is -1 where that output had ended.

    Attributes:
        prompt: The index of the prompt.
    """

    prompt: int


def output_differences(
    target: Engine,
    prompts: Sequence[Sequence[int]],
    runs: Sequence[Sequence[TimedGeneration]],
    baseline: Sequence[Sequence[TimedGeneration]],
    sampling: SamplingParams = GREEDY,
) -> tuple[OutputDifference, ...]:
    """Find where the tokens of `runs` differ from `baseline`, target-only decoding; both by prompt, then by repeat.

    The target alone is asked, one token at a time, along every output that differs, so that what follows a near-tie is
    judged as well; `sampling` holds the rules that the runs followed. The target's cache is emptied.
    """
    found: list[OutputDifference] = []
    for index, (prompt, repeats, alone) in enumerate(zip(prompts, runs, baseline, strict=True)):
        for tokens in dict.fromkeys(run.tokens for run in repeats):
            if tokens != alone[0].tokens:
                differences = _along(target, prompt, tokens, alone[0].tokens, sampling)
                found += [OutputDifference(**asdict(each), prompt=index) for each in differences]
    return tuple(found)


def _along(
    target: Engine, prompt: Sequence[int], tokens: Sequence[int], alone: Sequence[int], sampling: SamplingParams
) -> list[Difference]:
    """Returns where `tokens` leave `alone`, and each later token that the target would not have chosen."""
    pairs = enumerate(zip(tokens, alone, strict=False))
    departs = next((i for i, (token, other) in pairs if token != other), min(len(tokens), len(alone)))
    if departs == min(len(tokens), len(alone)):  # one goes on where the other ended
        ends = (tokens[departs] if len(tokens) > departs else -1, alone[departs] if len(alone) > departs else -1)
        return [Difference(departs, *ends, gap=float(np.finfo(np.float32).max), tolerance=0.0)]  # JSON has no infinity
    found: list[Difference] = []
    rules = make_logit_rules(sampling, target.manifest, prompt)
    for index, logits in enumerate(stepped_logits(target, GivenText(prompt, tokens))):
        row = ruled_rows(logits[None], tokens, rules, first=index)[0]
        if index == departs:
            gap = abs(float(row[alone[index]]) - float(row[tokens[index]]))
            found.append(Difference(index, tokens[index], alone[index], gap, tolerance(row, target.manifest)))
        elif index > departs and np.argmax(row) != tokens[index]:
            found.append(difference_at(index, tokens[index], row, target.manifest))
    return found
