"""Accept or reject drafted tokens: the rules that make drafting lossless, as pure functions of numbers."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.bundle.vocab_map import NOT_KEPT, HeadTokens
from engines.errors import VocabtrimError
from engines.outputs import Accepted
from runtime.sampling import sample


def accept_greedy(draft: Sequence[int], verified: NDArray[np.int64]) -> Accepted:
    """Accept the draft up to where the target would have chosen another token.

    Args:
        draft: g token ids.
        verified: int64[g + 1], the target's most likely token before and after each of them.
    """
    chosen = verified.tolist()
    count = next((i for i, token in enumerate(draft) if token != chosen[i]), len(draft))
    return Accepted(count, chosen[count])


def accept_forced(draft: Sequence[int], verified: NDArray[np.int64], count: int) -> Accepted:
    """Accept `count` drafted tokens, or all of fewer, whatever the target says: this measures latency alone.

    The output is then not the target's text.

    Args:
        draft: g token ids.
        verified: int64[g + 1], as in `accept_greedy`.
        count: The number of tokens to accept.
    """
    kept = min(count, len(draft))
    return Accepted(kept, int(verified[kept]))


def accept_sampled(
    draft: Sequence[int],
    q: Sequence[NDArray[np.float32] | None],
    p: Callable[[int], NDArray[np.float32]],
    head_tokens: HeadTokens | None,
    rng: np.random.Generator,
) -> Accepted:
    """Accept or replace drafted tokens so that the output has the distribution of the target alone.

    Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023, arXiv 2302.01318, algorithm 2.

    Args:
        draft: g token ids; token i was sampled from q[i].
        q: g arrays float32[rows], the drafter's distributions over the rows of its head. Tokens without a row have
            probability zero. None instead of an array: token i was certain and not sampled, as in prompt lookup.
        p: p(i) is the target's distribution after i drafted tokens, float32[n]; ids from n on have probability zero. It
            is a function because computing a distribution costs most, and none after the first rejection is needed.
        head_tokens: The token of each row of the drafter's head; None where row i is token i.
        rng: The source of randomness.

    Raises:
        VocabtrimError: q[i] cannot have given token i, or the outcome depends on a number that is no probability: NaN,
            infinite, or nothing left to sample from.
    """
    for i, token in enumerate(draft):
        p_i = p(i)
        p_token = float(p_i[token]) if token < len(p_i) else 0.0
        q_i = q[i]
        q_token = 1.0 if q_i is None else _probability(token, q_i, head_tokens)
        if not (0 < q_token < math.inf and 0 <= p_token < math.inf):  # NaN compares false
            raise VocabtrimError(
                f"token {token} has probability {q_token} in the drafter and {p_token} in the target, which no model "
                "gives: export both bundles again, with a wider --dtype"
            )
        # q <= p: always accept. q > p: accept with probability p / q.
        if rng.random() * q_token >= p_token:
            rest = _without(p_i, token) if q_i is None else residual(p_i, q_i, head_tokens)
            return Accepted(i, sample(rest, rng))
    return Accepted(len(draft), sample(p(len(draft)), rng))


def _probability(token: int, q: NDArray[np.float32], head_tokens: HeadTokens | None) -> float:
    row = token if head_tokens is None else int(head_tokens.inverse[token])
    return float(q[row]) if row != NOT_KEPT else 0.0


def _without(p: NDArray[np.float32], token: int) -> NDArray[np.float32]:
    """Returns `p` less a q that is certain of `token`, which was rejected. Not normalised."""
    rest = p.copy()
    if token < len(rest):
        rest[token] = 0
    return rest if rest.any() else p  # p was certain of it, and rounding alone rejected


def residual(p: NDArray[np.float32], q: NDArray[np.float32], head_tokens: HeadTokens | None) -> NDArray[np.float32]:
    """Compute the distribution that replaces a rejected token: the positive part of p − q.

    Args:
        p: float32[n], the target's distribution over token ids.
        q: float32[rows], the drafter's distribution over the rows of its head.
        head_tokens: The token of each row; None where row i is token i.

    Returns:
        float32[n], not normalised.
    """
    rest = p.copy()
    if head_tokens is None:
        width = min(len(p), len(q))  # one head may be padded further than the other
        rest[:width] -= q[:width]
    else:
        kept = head_tokens.kept_token_ids[: len(q)]
        inside = (kept != NOT_KEPT) & (kept < len(p))
        rest[kept[inside]] -= q[inside]
    np.maximum(rest, 0, out=rest)
    # Where p equals q, rounding alone rejected, and nothing is left over.
    return rest if rest.any() else p
