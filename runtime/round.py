"""`Round`: what one call of the target gave."""

from dataclasses import dataclass
from typing import Literal

from runtime.logprobs import TokenLogprob

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Round:
    """The result of one call of the target.

    Attributes:
        tokens: The new token ids, at least one.
        is_prefill: The target read the prompt, as it does in the first round.
        drafted: Drafted tokens that the target verified.
        accepted: Drafted tokens that the target accepted.
        prefill_seconds: Time to read the prompt: the target's in the first round, the drafter's when it first drafts.
        draft_seconds: Time to propose tokens.
        verify_seconds: Time of the target's call on them.
        seconds: Time of the whole round.
        finish_reason: Set on the last round: "stop" after an EOS, "length" at the tokens asked for or a full cache.
        logprobs: Those of `tokens`; empty where they were not asked for.
        looked_up: The number of drafted tokens, from the first on, that came from prompt lookup.
        is_paused: An adaptive draft length found that drafting does not pay here: this round drafts nothing, or a
            probe.
        cached: The tokens of the prompt that the target's cache held already; they were not read again.
    """

    tokens: tuple[int, ...]
    is_prefill: bool
    drafted: int
    accepted: int
    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float
    seconds: float
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] = ()
    looked_up: int = 0
    is_paused: bool = False
    cached: int = 0
