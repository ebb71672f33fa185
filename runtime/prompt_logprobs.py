"""Log-probabilities of a text that is there already, as evaluations ask for them."""

from collections.abc import Sequence

from engines.base import Engine
from runtime.kept_prefix import note_text, restart
from runtime.logprobs import TokenLogprob, token_logprobs


def prompt_logprobs(
    target: Engine, drafter: Engine | None, token_ids: Sequence[int], top: int
) -> tuple[TokenLogprob, ...]:
    """Read a text from its first token on, in as few calls as the target's `max_keep` allows.

    The target's cache then holds the text but its last token, so that a generation can go on from it.

    Args:
        target: The target.
        drafter: The drafter, which reads nothing; None for the target alone.
        token_ids: The text, at least one token.
        top: The number of alternatives to give for each token; 0 for none.

    Returns:
        One entry for each token but the first.

    Raises:
        VocabtrimError: The text is not wanted any more.
    """
    restart(target, drafter, token_ids, keep=False)
    scores: list[TokenLogprob] = []
    for begin in range(0, len(token_ids) - 1, target.max_keep):
        if begin:
            target.use.check_wanted()
        fed = token_ids[begin : min(begin + target.max_keep, len(token_ids) - 1)]
        scores += token_logprobs(target.feed(fed, keep=len(fed)).logits, token_ids[begin + 1 :], top)
    note_text(target, drafter, list(token_ids))
    return tuple(scores)
