"""The report of a bench: figures of each mode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from engines.bundle.read import Manifest
from engines.sampling_params import SamplingParams
from runtime.alarm import Collapse, find_collapse
from runtime.draft_length import DraftLength
from runtime.loop import GREEDY
from runtime.measure.outputs import OutputDifference
from runtime.measure.percentiles import call_percentiles, draft_percentiles, host_percentiles, round_percentiles
from runtime.measure.timing import TimedGeneration
from runtime.stats import Percentiles, latency_speedup, mbsu, round_tokens_per_second, summarize

Runs = Sequence[Sequence[TimedGeneration]]  # of one mode: by prompt, then by repeat


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One way of decoding the same prompts.

    Attributes:
        tokens_per_second: All new tokens over all seconds, prefills included; the median repeat of each prompt counts.
        speedup: tokens_per_second over that of target-only decoding.
        decode_tokens_per_second: As tokens_per_second, without the prefills, which speculation does not change.
        decode_speedup: decode_tokens_per_second over that of target-only decoding.
        block_efficiency: See `Stats`.
        acceptance: See `Stats`.
        drafted_per_round: Tokens drafted for each round: γ but at a text's end, or what an adaptive length chose.
        draft_step_ms: Median of the drafter's steps of one token; if it made none, of its drafts, divided by their
            tokens. None where it drafted nothing.
        verify_ms: Median of the target's calls on a full draft, γ + 1 tokens, or on any where their length adapts; in
            target-only decoding, of its one-token steps. None where no such call was made.
        draft_step_percentiles_ms: Percentiles of the same steps.
        verify_percentiles_ms: Percentiles of the same calls.
        round_percentiles_ms: Percentiles of whole rounds with a full draft; in target-only decoding, of one step.
        host_percentiles_ms: Percentiles of the time in such rounds that is neither drafting nor verifying; where a GPU
            times these itself, all the time that it waits for the host.
        bytes_per_step: Bytes that one draft step reads, weights and KV cache at the mean context; in target-only
            decoding, those of a target step.
        bandwidth_fraction: bytes_per_step over that step's time over the measured bandwidth of its engine's memory.
        mbsu: τ/(c·γ + 1), where c is the drafter's bytes_per_step over the target's.
        latency_speedup: The decode_speedup that the measured steps predict, see `stats.latency_speedup`.
        predicted_tokens_per_second: The decode_tokens_per_second that the steps and overhead_ms predict.
        coverage: From the drafter's manifest.
        overhead: The share of the time that is spent outside the engines.
        overhead_ms: That time, for each round.
        equal_prompts: Prompts whose tokens equal those of target-only decoding in every repeat; None where acceptance
            was forced.
        differing_prompts: The indices of the other prompts.
        near_ties: Differences from the target's choice by a gap in the logits that rounding explains.
        differences: Differences by a larger gap.
        collapse: A collapse of the drafter's acceptance, if there was one and acceptance was not forced.
    """

    tokens_per_second: float
    speedup: float
    decode_tokens_per_second: float
    decode_speedup: float
    block_efficiency: float
    acceptance: tuple[float, ...]
    drafted_per_round: float
    draft_step_ms: float | None
    verify_ms: float | None
    draft_step_percentiles_ms: Percentiles | None
    verify_percentiles_ms: Percentiles | None
    round_percentiles_ms: Percentiles | None
    host_percentiles_ms: Percentiles | None
    bytes_per_step: float
    bandwidth_fraction: float | None
    mbsu: float
    latency_speedup: float | None
    predicted_tokens_per_second: float | None
    coverage: float | None
    overhead: float
    overhead_ms: float
    equal_prompts: int | None
    differing_prompts: tuple[int, ...]
    near_ties: tuple[OutputDifference, ...]
    differences: tuple[OutputDifference, ...]
    collapse: Collapse | None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What a benchmark measured.

    Attributes:
        modes: The ways of decoding by name, "target_only" first.
        prompts: The number of prompts.
        max_new_tokens: Tokens generated for each prompt, at most.
        draft_length: γ; where it adapts, the longest draft.
        adapts: Drafts are as long as they are worth their time.
        repeats: How often each prompt was decoded in each mode.
        force_accepted: The number of drafted tokens that each round accepted; None where the target judged the drafts.
        bandwidth: Bytes/s that the target's memory was measured to deliver.
        environment: Processor, cores, GPU if there is one, versions, and those of the tools that made the target's
            bundle.
        sampling: Greedy, with the rules that were given in addition to the target's own.
    """

    modes: Mapping[str, ModeReport]
    prompts: int
    max_new_tokens: int
    draft_length: int
    adapts: bool
    repeats: int
    force_accepted: int | None
    bandwidth: float
    environment: Mapping[str, Any]
    sampling: SamplingParams = GREEDY

    @property
    def lossless(self) -> bool | None:
        """Every mode gave the tokens of target-only decoding on every prompt, but for near-ties.

        None where acceptance was forced.
        """
        return None if self.force_accepted is not None else not any(mode.differences for mode in self.modes.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        return {"kind": "bench"} | asdict(self) | {"lossless": self.lossless}


def mode_report(
    runs: Runs,
    baseline: Runs,
    target: Manifest,
    drafter: Manifest | None,
    length: DraftLength,
    bandwidth: float,
    *,
    differences: Sequence[OutputDifference] | None = (),
) -> ModeReport:
    """Summarise the runs of one mode.

    Args:
        runs: The runs by prompt and repeat.
        baseline: The runs of target-only decoding.
        target: The target's manifest.
        drafter: The drafter's manifest; None for target-only decoding.
        length: How long drafts were.
        bandwidth: Bytes/s of the memory of the engine whose steps bytes_per_step counts.
        differences: See `output_differences`; None where acceptance was forced and the tokens mean nothing.
    """
    flat = _flat(runs)
    stats = summarize(entry for run in flat for entry in run.rounds)
    drafted = stats.drafted / max(1, stats.rounds)
    fixed = None if drafter and length.adapts else length.longest if drafter else 0
    context = sum(run.target[0].tokens + len(run.tokens) / 2 for run in _flat(baseline)) / len(_flat(baseline))
    target_bytes, step_bytes = step_bytes_at(target, context), step_bytes_at(drafter or target, context)
    length_used = drafted if fixed is None else fixed
    more_experts = target.weight_bytes(length_used + 1) - target.weight_bytes(1)
    step = call_percentiles(flat, "drafter" if drafter else "target", 1)
    forced = differences is None
    differing = () if forced else _differing(runs, baseline)
    return ModeReport(
        tokens_per_second=_rate(runs, _all),
        speedup=_rate(runs, _all) / _rate(baseline, _all),
        decode_tokens_per_second=_rate(runs, _decoding),
        decode_speedup=_ratio(_rate(runs, _decoding), _rate(baseline, _decoding)),
        block_efficiency=stats.block_efficiency,
        acceptance=stats.acceptance,
        bytes_per_step=step_bytes,
        bandwidth_fraction=step_bytes / (step.p50 / 1e3) / bandwidth if step else None,
        drafted_per_round=drafted,
        mbsu=mbsu(stats.block_efficiency, step_bytes / target_bytes, length_used, 1 + more_experts / target_bytes),
        **_times(flat, call_percentiles(_flat(baseline), "target", 1), stats.block_efficiency, fixed, drafted),
        coverage=drafter.coverage if drafter else None,
        equal_prompts=None if forced else len(runs) - len(differing),
        differing_prompts=differing,
        near_ties=tuple(each for each in differences or () if each.verdict == "near-tie"),
        differences=tuple(each for each in differences or () if each.verdict == "different"),
        collapse=find_collapse((e for run in flat for e in run.rounds), drafter) if drafter and not forced else None,
    )


def _times(
    runs: Sequence[TimedGeneration], target_step: Percentiles | None, tau: float, fixed: int | None, drafted: float
) -> dict[str, Any]:
    """Returns the fields of `ModeReport` that follow from the times of calls and rounds.

    Args:
        runs: The runs of the mode.
        target_step: The times of a step of the target alone.
        tau: The block efficiency.
        fixed: γ; 0 for the target alone, None where it adapts.
        drafted: Tokens drafted per round.
    """
    length = drafted if fixed is None else fixed
    draft, verify = (
        call_percentiles(runs, "drafter", 1),
        call_percentiles(runs, "target", None if fixed is None else fixed + 1),
    )
    if fixed and draft is None:  # γ = 1, and a drafter that was always two tokens behind
        draft = draft_percentiles(runs, fixed)
    seconds, outside = sum(run.seconds for run in runs), sum(run.seconds - run.engine_seconds for run in runs)
    overhead_ms = 1e3 * outside / sum(len(run.rounds) for run in runs)
    draft_ms, verify_ms = draft.p50 if draft else None, verify.p50 if verify else None
    speedup = rate = None
    if verify_ms and target_step and (draft_ms or not length):
        speedup = latency_speedup(tau, draft_ms or 0, verify_ms, target_step.p50, length)
        rate = round_tokens_per_second(tau, draft_ms or 0, verify_ms, overhead_ms, length)
    return {
        "draft_step_ms": draft_ms,
        "verify_ms": verify_ms,
        "draft_step_percentiles_ms": draft,
        "verify_percentiles_ms": verify,
        "round_percentiles_ms": round_percentiles(runs, fixed),
        "host_percentiles_ms": host_percentiles(runs, fixed),
        "latency_speedup": speedup,
        "predicted_tokens_per_second": rate,
        "overhead": outside / seconds,
        "overhead_ms": overhead_ms,
    }


def step_bytes_at(manifest: Manifest, context: float) -> float:
    """Bytes that a decode step reads: weights, and keys and values of `context` tokens."""
    return manifest.weight_bytes_per_step + manifest.kv_bytes_per_token * context


def _flat(runs: Runs) -> list[TimedGeneration]:
    return [run for repeats in runs for run in repeats]


def _all(run: TimedGeneration) -> tuple[int, float]:
    return len(run.tokens), run.seconds


def _decoding(run: TimedGeneration) -> tuple[int, float]:
    return run.decoded, run.decode_seconds


def _rate(runs: Runs, of: Callable[[TimedGeneration], tuple[int, float]]) -> float:
    """Tokens/s; of each prompt the median of the repeats. 0 where nothing was decoded."""
    seconds = sum(median(of(run)[1] for run in repeats) for repeats in runs)
    return _ratio(sum(of(repeats[0])[0] for repeats in runs), seconds)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _differing(runs: Runs, baseline: Runs) -> tuple[int, ...]:
    wanted = [repeats[0].tokens for repeats in baseline]
    return tuple(i for i, repeats in enumerate(runs) if any(run.tokens != wanted[i] for run in repeats))
