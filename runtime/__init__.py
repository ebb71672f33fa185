"""The lossless draft/verify loop over two engines.

The modules of `runtime.measure` measure it (bench, sweep, plan_measurement, bandwidth), those of
`runtime.verification` compare its output with the target's own (greedy, sampled).
"""

from engines.outputs import Accepted
from engines.sampling_params import SamplingParams
from runtime.accept import accept_forced, accept_greedy, accept_sampled
from runtime.alarm import Collapse
from runtime.decoder import SpeculativeDecoder
from runtime.logprobs import TokenLogprob
from runtime.loop import decode_rounds
from runtime.round import Round
from runtime.sampling import distribution
from runtime.snapshot import Snapshot
from runtime.stats import Percentiles, Stats, latency_speedup, mbsu, summarize
from runtime.stream import Generation, Stream, Token

__all__ = [
    "Accepted",
    "Collapse",
    "Generation",
    "Percentiles",
    "Round",
    "SamplingParams",
    "Snapshot",
    "SpeculativeDecoder",
    "Stats",
    "Stream",
    "Token",
    "TokenLogprob",
    "accept_forced",
    "accept_greedy",
    "accept_sampled",
    "decode_rounds",
    "distribution",
    "latency_speedup",
    "mbsu",
    "summarize",
]
