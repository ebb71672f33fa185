"""Measures what a plan needs, and makes the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from engines.base import Engine
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.measure.bench import TARGET_ONLY, measured_on
from runtime.measure.percentiles import call_percentiles, draft_percentiles, round_percentiles
from runtime.measure.planner import DrafterTimes, Plan, RoundTimes, expected_block_efficiency, plan
from runtime.measure.sweep import Prompts, SweepSettings, check_settings, encoded_at
from runtime.measure.timing import TimedGeneration, Way, measure
from runtime.stats import Percentiles, summarize

_ROUNDS = 10  # that time each γ, in each repeat


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan and the measurements that it was made from.

    Attributes:
        plan: The plan.
        target_step_ms: The time of a whole round of the target alone, in ms.
        drafters: The measured times of each drafter.
        prompts: The number of prompts.
        settings: The settings of the measurement.
        environment: See `BenchReport`.
    """

    plan: Plan
    target_step_ms: float
    drafters: tuple[DrafterTimes, ...]
    prompts: int
    settings: SweepSettings
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `json.dumps`."""
        return {"kind": "plan"} | asdict(self) | {"plan": self.plan.to_dict()}


def make_plan(
    target: Engine,
    drafters: Mapping[str, Engine],
    prompts: Prompts,
    settings: SweepSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PlanReport:
    """Measure what `plan` needs and make one. This takes far less time than a sweep.

    First each drafter decodes the prompts once at the largest γ, which gives its acceptance. Then every γ is timed on
    the prompt of median length, in a few rounds that accept as many tokens as are to be expected, all interleaved.

    Args:
        target: The target.
        drafters: The drafters to choose from, by their names.
        prompts: Token ids of each prompt.
        settings: Those of a sweep, with one context at most and no forced acceptance.
        progress: Called with (generations done, all of them).

    Raises:
        VocabtrimError: An error of `sweep`, or more than one context.
    """
    if not drafters or len(settings.contexts) > 1 or settings.force_accepted is not None:
        raise VocabtrimError("a plan needs a drafter, one context at most, and an acceptance that is not forced")
    lengths = check_settings(target, drafters, prompts, settings)
    encoded = encoded_at(target, prompts, settings.contexts[0] if settings.contexts else None)
    report, done_before = progress or (lambda _done, _total: None), len(encoded) * len(drafters)
    total = done_before + settings.repeats * (1 + len(drafters) * len(lengths))
    longest = {
        name: Way(drafter, max(lengths), encoded, settings.max_new_tokens, sampling=settings.sampling)
        for name, drafter in drafters.items()
    }
    runs = measure(target, longest, 1, lambda done, _: report(done, total))
    acceptance = {name: _acceptance(runs[name]) for name in drafters}
    ways = _timed_ways(drafters, lengths, acceptance, sorted(encoded, key=len)[len(encoded) // 2], settings.sampling)
    times = measure(target, ways, settings.repeats, lambda done, _: report(done_before + done, total))
    step_ms = _median(round_percentiles(times[TARGET_ONLY][0], 0))
    measured = tuple(
        _drafter_times(name, drafter, acceptance[name], {n: times[_label(name, n)][0] for n in lengths})
        for name, drafter in drafters.items()
    )
    used, made = replace(settings, draft_lengths=lengths), plan(step_ms, measured, target.manifest)
    return PlanReport(made, step_ms, measured, len(prompts), used, measured_on(target, drafters))


def _label(name: str, draft_length: int) -> str:
    return f"{name} γ={draft_length}"


def _acceptance(runs: Sequence[Sequence[TimedGeneration]]) -> tuple[float, ...]:
    return summarize(entry for repeats in runs for run in repeats for entry in run.rounds).acceptance


def _timed_ways(
    drafters: Mapping[str, Engine],
    lengths: Sequence[int],
    acceptance: Mapping[str, Sequence[float]],
    prompt: Sequence[int],
    sampling: SamplingParams,
) -> dict[str, Way]:
    """Returns the ways that are timed, by their labels: the target alone, and each drafter at each γ.

    They are a few full rounds that accept the expected number of tokens, on which catching up depends.

    Args:
        drafters: The drafters by name.
        lengths: The values of γ.
        acceptance: The measured acceptance of each drafter, by position.
        prompt: Token ids.
        sampling: Greedy, with rules on logits.
    """
    ways = {TARGET_ONLY: Way(None, 1, [prompt], _ROUNDS, 0, sampling)}
    for (name, drafter), length in product(drafters.items(), lengths):
        accepted = min(round(expected_block_efficiency(acceptance[name], length) - 1), length)
        tokens = min(_ROUNDS * (accepted + 1) + length, drafter.capacity - len(prompt))
        ways[_label(name, length)] = Way(drafter, length, [prompt], tokens, accepted, sampling)
    return ways


def _drafter_times(
    name: str, drafter: Engine, acceptance: tuple[float, ...], runs: Mapping[int, Sequence[TimedGeneration]]
) -> DrafterTimes:
    rounds = tuple(
        RoundTimes(
            length,
            _median(draft_percentiles(timed, length)),
            _median(call_percentiles(timed, "target", length + 1)),
            _median(round_percentiles(timed, length)),
        )
        for length, timed in runs.items()
    )
    manifest = drafter.manifest
    share = manifest.head_bytes / manifest.weight_bytes_per_step
    return DrafterTimes(name, manifest.head_rows, drafter.vocab_map is not None, share, acceptance, rounds)


def _median(times: Percentiles | None) -> float:
    if times is None:
        raise VocabtrimError("no full round could be timed: shorten the prompts, or export with a longer --max-length")
    return times.p50
