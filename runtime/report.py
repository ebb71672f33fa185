"""What the runs of a bench say about each mode."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from engines.bundle import Manifest
from runtime.stats import mbsu, summarize
from runtime.timing import Feed, Run

Runs = Sequence[Sequence[Run]]  # of one mode: by prompt, then by repeat


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One way of decoding the same prompts.

    tokens_per_second: all new tokens over all seconds, prefills included; of each prompt the median of the repeats.
    speedup: tokens_per_second over that of target-only decoding.
    block_efficiency, acceptance: see `Stats`.
    draft_step_ms: median of the drafter's steps of one token. verify_ms: median of the target's calls on a full
    draft, γ + 1 tokens; of its one-token steps in target-only decoding. None where no such call was made.
    bytes_per_step: what one draft step reads, weights and KV cache at the mean context; the target's in target-only.
    bandwidth_fraction: bytes_per_step over that step's time over the machine's measured bandwidth.
    mbsu: τ/(c·γ + 1), c the drafter's bytes_per_step over the target's. coverage: from the drafter's manifest.
    overhead: the share of the time spent outside the engines.
    equal_prompts: prompts whose tokens were those of target-only decoding in every repeat. differing_prompts: the
    indices of the others.
    """

    tokens_per_second: float
    speedup: float
    block_efficiency: float
    acceptance: tuple[float, ...]
    draft_step_ms: float | None
    verify_ms: float | None
    bytes_per_step: float
    bandwidth_fraction: float | None
    mbsu: float
    coverage: float | None
    overhead: float
    equal_prompts: int
    differing_prompts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """`modes` by name, "target_only" first. bandwidth: bytes/s that the machine's memory was measured to deliver.

    environment: processor, cores, versions, and those of the tools that made the target's bundle.
    """

    modes: Mapping[str, ModeReport]
    prompts: int
    max_new_tokens: int
    draft_length: int
    repeats: int
    bandwidth: float
    environment: Mapping[str, Any]

    @property
    def lossless(self) -> bool:
        """Every mode gave the tokens of target-only decoding on every prompt."""
        return not any(mode.differing_prompts for mode in self.modes.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        return asdict(self) | {"lossless": self.lossless}


def mode_report(
    runs: Runs, baseline: Runs, target: Manifest, drafter: Manifest | None, draft_length: int, bandwidth: float
) -> ModeReport:
    """Sum `runs` up. baseline: the runs of target-only decoding. drafter: None where `runs` are these."""
    stats = summarize(entry for run in _flat(runs) for entry in run.rounds)
    context = sum(run.target[0].tokens + len(run.tokens) / 2 for run in _flat(baseline)) / len(_flat(baseline))
    target_bytes, step_bytes = _step_bytes(target, context), _step_bytes(drafter or target, context)
    width = draft_length + 1 if drafter else 1
    draft_ms = _median_ms(feed for run in _flat(runs) for feed in run.drafter if feed.tokens == 1)
    verify_ms = _median_ms(feed for run in _flat(runs) for feed in run.target[1:] if feed.tokens == width)
    step_ms = draft_ms if drafter else verify_ms
    differing = _differing(runs, baseline)
    return ModeReport(
        tokens_per_second=_tokens_per_second(runs),
        speedup=_tokens_per_second(runs) / _tokens_per_second(baseline),
        block_efficiency=stats.block_efficiency,
        acceptance=stats.acceptance,
        draft_step_ms=draft_ms,
        verify_ms=verify_ms,
        bytes_per_step=step_bytes,
        bandwidth_fraction=step_bytes / (step_ms / 1e3) / bandwidth if step_ms else None,
        mbsu=mbsu(stats.block_efficiency, step_bytes / target_bytes, draft_length if drafter else 0),
        coverage=drafter.coverage if drafter else None,
        overhead=1 - sum(run.engine_seconds for run in _flat(runs)) / sum(run.seconds for run in _flat(runs)),
        equal_prompts=len(runs) - len(differing),
        differing_prompts=differing,
    )


def _flat(runs: Runs) -> list[Run]:
    return [run for repeats in runs for run in repeats]


def _tokens_per_second(runs: Runs) -> float:
    seconds = sum(median(run.seconds for run in repeats) for repeats in runs)
    return sum(len(repeats[0].tokens) for repeats in runs) / seconds


def _step_bytes(manifest: Manifest, context: float) -> float:
    return manifest.weight_bytes_per_step + manifest.kv_bytes_per_token * context


def _median_ms(feeds: Iterable[Feed]) -> float | None:
    seconds = [feed.seconds for feed in feeds]
    return median(seconds) * 1e3 if seconds else None


def _differing(runs: Runs, baseline: Runs) -> tuple[int, ...]:
    wanted = [repeats[0].tokens for repeats in baseline]
    return tuple(i for i, repeats in enumerate(runs) if any(run.tokens != wanted[i] for run in repeats))
