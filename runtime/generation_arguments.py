"""Checks of a generation's arguments, before anything is computed."""

from typing import Any

from engines.arguments import whole_number
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams


def require_new_tokens(max_new_tokens: Any) -> int:
    """Returns the most tokens to generate, an int of at least 1.

    Raises:
        VocabtrimError: It is something else.
    """
    number = whole_number("max_new_tokens", max_new_tokens)
    if number < 1:
        raise VocabtrimError(f"max_new_tokens is {number}: give 1 or more")
    return number


def require_logprobs(logprobs: Any) -> int | None:
    """Returns the number of alternatives to give with each token's log-probability; None for no log-probabilities.

    Args:
        logprobs: A number of at least 0; True asks for no alternatives; None or False for no log-probabilities.

    Raises:
        VocabtrimError: It is something else.
    """
    if isinstance(logprobs, bool):
        return 0 if logprobs else None
    if logprobs is None:
        return None
    number = whole_number("logprobs", logprobs)
    if number < 0:
        raise VocabtrimError(f"logprobs is {number}: give the number of alternatives, or 0 for none")
    return number


def check_sampling(sampling: Any, vocab_size: int) -> None:
    """Check how tokens are to be chosen.

    Args:
        sampling: `SamplingParams`.
        vocab_size: The number of the target's tokens.

    Raises:
        VocabtrimError: It is of another type, or names a token that the target lacks.
    """
    if not isinstance(sampling, SamplingParams):
        raise VocabtrimError(f"sampling is {sampling!r}: give SamplingParams(...), or leave it out to be greedy")
    sampling.check_token_ids(vocab_size)
