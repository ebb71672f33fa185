"""`Echo`: the prompt of an answer that begins with it, as evaluations ask for it."""

from dataclasses import dataclass

from runtime import Generation, TokenLogprob, summarize

NOTHING = Generation("", (), "length", summarize([]))  # of a request that asks for no new tokens


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is given back.

    Attributes:
        prompt: Token ids.
        logprobs: One entry for each of them but the first; None where none were asked for.
    """

    prompt: list[int]
    logprobs: tuple[TokenLogprob, ...] | None
