"""Summarises the timed runs of one way of decoding as a `ModeReport`."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from engines.base import DeviceName, Engine
from engines.bundle.read import Manifest
from runtime.alarm import find_collapse
from runtime.draft_length import DraftLength
from runtime.measure.expert_reads import ExpertReads
from runtime.measure.outputs import OutputDifference, output_differences
from runtime.measure.percentiles import call_percentiles, draft_percentiles, host_percentiles, round_percentiles
from runtime.measure.report import ModeReport
from runtime.measure.timing import TimedGeneration, Way
from runtime.stats import Percentiles, latency_speedup, mbsu, round_tokens_per_second, summarize

Runs = Sequence[Sequence[TimedGeneration]]  # all runs of one way, by prompt, then by repeat


def way_report(
    target: Engine, way: Way, runs: Runs, baseline: Runs, bandwidths: Mapping[DeviceName, float]
) -> ModeReport:
    """Compare the outputs of one way of decoding with those of the target alone, and summarise its runs.

    The target's cache is emptied where outputs differ.

    Args:
        target: The target's engine.
        way: The way of decoding.
        runs: The runs of `way`, by prompt and repeat.
        baseline: The runs of target-only decoding on the same prompts.
        bandwidths: Bytes/s that the memory of each device delivers.
    """
    differences = None
    if way.force_accepted is None:
        differences = output_differences(target, way.prompts, runs, baseline, way.sampling)
    drafter = way.drafter.manifest if way.drafter else None
    bandwidth = bandwidths[(way.drafter or target).device]
    return mode_report(runs, baseline, target.manifest, drafter, way.length, bandwidth, differences=differences)


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
        length: The draft length.
        bandwidth: Bytes/s of the memory of the engine whose steps bytes_per_step counts.
        differences: See `output_differences`; None where acceptance was forced and the tokens mean nothing.
    """
    flat = _flat(runs)
    stats = summarize(entry for run in flat for entry in run.rounds)
    drafted = stats.drafted / max(1, stats.rounds)
    fixed = None if drafter and length.adapts else length.longest if drafter else 0
    context = sum(run.target[0].tokens + len(run.tokens) / 2 for run in _flat(baseline)) / len(_flat(baseline))
    target_bytes, step_bytes = _step_bytes(target, context), _step_bytes(drafter or target, context)
    length_used = drafted if fixed is None else fixed
    more_experts = target.weight_bytes(length_used + 1) - target.weight_bytes(1)
    step = call_percentiles(flat, "drafter" if drafter else "target", 1)
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
        expert_reads=ExpertReads.of(target, length_used + 1) if drafter else None,
        coverage=drafter.coverage if drafter else None,
        **_times(flat, call_percentiles(_flat(baseline), "target", 1), stats.block_efficiency, fixed, drafted),
        **_outputs(runs, baseline, drafter, differences),
    )


def _outputs(
    runs: Runs, baseline: Runs, drafter: Manifest | None, differences: Sequence[OutputDifference] | None
) -> dict[str, Any]:
    """Returns the fields of `ModeReport` that follow from the tokens: what differs, and whether acceptance collapsed.

    Args:
        runs: The runs of the mode.
        baseline: The runs of target-only decoding.
        drafter: The drafter's manifest; None for target-only decoding.
        differences: See `mode_report`.
    """
    forced = differences is None
    differing = () if forced else _differing(runs, baseline)
    rounds = (entry for run in _flat(runs) for entry in run.rounds)
    return {
        "equal_prompts": None if forced else len(runs) - len(differing),
        "differing_prompts": differing,
        "near_ties": tuple(each for each in differences or () if each.verdict == "near-tie"),
        "differences": tuple(each for each in differences or () if each.verdict == "different"),
        "collapse": find_collapse(rounds, drafter) if drafter and not forced else None,
    }


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


def _step_bytes(manifest: Manifest, context: float) -> float:
    """Returns the bytes that a decode step reads: the weights, and the keys and values of `context` tokens."""
    return manifest.weight_bytes_per_step + manifest.kv_bytes_per_token * context


def _flat(runs: Runs) -> list[TimedGeneration]:
    return [run for repeats in runs for run in repeats]


def _all(run: TimedGeneration) -> tuple[int, float]:
    """Returns the tokens and the seconds of a run, prefills included."""
    return len(run.tokens), run.seconds


def _decoding(run: TimedGeneration) -> tuple[int, float]:
    """Returns the tokens and the seconds of a run without its prefills."""
    return run.decoded, run.decode_seconds


def _rate(runs: Runs, count: Callable[[TimedGeneration], tuple[int, float]]) -> float:
    """Returns tokens/s over all prompts, where each prompt counts with its median repeat; 0 where nothing was decoded.

    Args:
        runs: The runs by prompt and repeat.
        count: Returns the tokens and the seconds of a run that count.
    """
    seconds = sum(median(count(run)[1] for run in repeats) for repeats in runs)
    return _ratio(sum(count(repeats[0])[0] for repeats in runs), seconds)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _differing(runs: Runs, baseline: Runs) -> tuple[int, ...]:
    """Returns the indices of the prompts with a repeat whose tokens are not those of target-only decoding."""
    wanted = [repeats[0].tokens for repeats in baseline]
    return tuple(i for i, repeats in enumerate(runs) if any(run.tokens != wanted[i] for run in repeats))
