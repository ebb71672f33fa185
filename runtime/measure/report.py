"""The report of a bench: the figures of each mode, the settings and the machine."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engines.sampling_params import SamplingParams
from runtime.alarm import Collapse
from runtime.loop import GREEDY
from runtime.measure.expert_reads import ExpertReads
from runtime.measure.outputs import OutputDifference
from runtime.stats import Percentiles


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One way of decoding the same prompts.

    Attributes:
        tokens_per_second: All new tokens over all seconds, prefills included; the median repeat of each prompt counts.
        speedup: tokens_per_second over that of target-only decoding.
        decode_tokens_per_second: tokens_per_second without the prefills, which speculation does not change.
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
        mbsu: τ/(c·γ + v), where c is the drafter's bytes_per_step over the target's, and v is 1 but for a mixture of
            experts, whose verification reads more experts than its step.
        expert_reads: What a verification reads of a mixture of experts; None for a dense target, and where nothing is
            verified.
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
    expert_reads: ExpertReads | None
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
    """The result of a benchmark.

    Attributes:
        modes: The ways of decoding by name, "target_only" first.
        prompts: The number of prompts.
        max_new_tokens: Tokens generated for each prompt, at most.
        draft_length: γ; where it adapts, the longest draft.
        adapts: Drafts are as long as they are worth their time.
        repeats: The number of times that each prompt was decoded in each mode.
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
        """Returns plain data for `json.dumps`."""
        return {"kind": "bench"} | asdict(self) | {"lossless": self.lossless}
