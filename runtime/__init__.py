"""The lossless draft/verify loop over two engines, and its measurement."""

from engines.base import Accepted
from engines.sampling_params import SamplingParams
from runtime.accept import accept_forced, accept_greedy, accept_sampled
from runtime.alarm import Collapse
from runtime.decoder import SpeculativeDecoder
from runtime.logprobs import TokenLogprob
from runtime.loop import Round, decode_rounds
from runtime.measure.bandwidth import read_bandwidth
from runtime.measure.bench import TARGET_ONLY, bench
from runtime.measure.plan_measurement import PlanReport, make_plan
from runtime.measure.planner import Candidate, Plan, plan
from runtime.measure.report import BenchReport, ModeReport
from runtime.measure.sweep import SweepReport, SweepRow, SweepSettings, sweep
from runtime.sampling import distribution
from runtime.stats import Percentiles, Stats, latency_speedup, mbsu, summarize
from runtime.stream import Generation, Stream, Token
from runtime.verification.greedy import Difference, PromptReport, VerifyReport, verify
from runtime.verification.sampled import SamplingReport, SettingReport, verify_sampling

__all__ = [
    "TARGET_ONLY",
    "Accepted",
    "BenchReport",
    "Candidate",
    "Collapse",
    "Difference",
    "Generation",
    "ModeReport",
    "Percentiles",
    "Plan",
    "PlanReport",
    "PromptReport",
    "Round",
    "SamplingParams",
    "SamplingReport",
    "SettingReport",
    "SpeculativeDecoder",
    "Stats",
    "Stream",
    "SweepReport",
    "SweepRow",
    "SweepSettings",
    "Token",
    "TokenLogprob",
    "VerifyReport",
    "accept_forced",
    "accept_greedy",
    "accept_sampled",
    "bench",
    "decode_rounds",
    "distribution",
    "latency_speedup",
    "make_plan",
    "mbsu",
    "plan",
    "read_bandwidth",
    "summarize",
    "sweep",
    "verify",
    "verify_sampling",
]
