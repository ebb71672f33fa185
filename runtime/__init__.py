"""The lossless draft/verify loop over two engines, and its measurement."""

from runtime.accept import Accepted, accept_greedy, accept_sampled
from runtime.bandwidth import read_bandwidth
from runtime.bench import TARGET_ONLY, bench
from runtime.decoder import Generation, SpeculativeDecoder, Stream, Token
from runtime.loop import Round, decode_rounds
from runtime.report import BenchReport, ModeReport
from runtime.sampling import SamplingParams, distribution
from runtime.stats import Stats, mbsu, summarize

__all__ = [
    "TARGET_ONLY",
    "Accepted",
    "BenchReport",
    "Generation",
    "ModeReport",
    "Round",
    "SamplingParams",
    "SpeculativeDecoder",
    "Stats",
    "Stream",
    "Token",
    "accept_greedy",
    "accept_sampled",
    "bench",
    "decode_rounds",
    "distribution",
    "mbsu",
    "read_bandwidth",
    "summarize",
]
