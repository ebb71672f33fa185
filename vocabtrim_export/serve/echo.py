"""`Echo`: an answer that begins with its prompt, as evaluations ask for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime import Generation, TokenLogprob, summarize

NOTHING = Generation("", (), "length", summarize([]))  # of a request that asks for no new tokens


@dataclass(frozen=True, slots=True)
class Echo(Generation):
    """A generation with its prompt.

    Attributes:
        prompt: Token ids.
        prompt_logprobs: One entry for each of them but the first; empty where none were asked for.
    """

    prompt: Sequence[int] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, new: Generation, prompt: Sequence[int], prompt_logprobs: tuple[TokenLogprob, ...]) -> "Echo":
        """Returns a generation with its prompt, which was read anew for its log-probabilities if there are any."""
        stats = replace(new.stats, cached=0) if prompt_logprobs else new.stats
        return cls(new.text, new.token_ids, new.finish_reason, stats, new.logprobs, prompt, prompt_logprobs)
