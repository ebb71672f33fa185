"""A feed as runs of a session: which tokens go into each, and after how many of them it predicts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.ort.key_tiles import KeyTiles


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a session: some of a feed's tokens, in their order.

    Attributes:
        ids: int64[n], the tokens.
        keep: The last positions whose predictions the feed asks for; 0 where it asks for none of them.
        is_last: Whether this is the feed's last call. Another one overwrites the buffers that this one fills.
        features: [n, features_read], the rows that a head reads with the tokens; None where it reads none, or goes on
            from the row that it computed last.
    """

    ids: NDArray[np.int64]
    keep: int
    is_last: bool
    features: NDArray[Any] | None = None

    @property
    def predicted(self) -> int:
        """The last positions that the graph predicts after: at least one, whether anyone asks for it or not."""
        return max(self.keep, 1)


def plan_calls(
    ids: NDArray[np.int64],
    keep: int,
    begin: int,
    longest: int,
    tiles: KeyTiles,
    features: NDArray[Any] | None = None,
) -> list[Call]:
    """Cut a feed into calls.

    Args:
        ids: int64[n], the tokens to feed, at least one.
        keep: The last positions to predict after, between 1 and both `n` and `longest`.
        begin: The tokens in the cache.
        longest: The most tokens of a call.
        tiles: The other places where a call must begin.
        features: [n, features_read], or None; see `Call`.

    Raises:
        ValueError: More positions are kept than there are tokens, or than a call holds.
    """
    if keep > min(len(ids), longest):
        raise ValueError(f"{keep} positions cannot be kept of {len(ids)} tokens in calls of {longest} at most")
    if len(ids) <= longest and not tiles.cuts:  # almost every feed, so that planning costs a step nothing
        return [Call(ids, keep, True, features)]
    calls, start = list[Call](), 0
    for length in _lengths(len(ids), keep, begin, longest, tiles):
        stop = start + length
        later = len(ids) - stop
        rows = None if features is None else features[start:stop]
        calls.append(Call(ids[start:stop], min(max(keep - later, 0), length), later == 0, rows))
        start = stop
    return calls


def _lengths(count: int, keep: int, begin: int, longest: int, tiles: KeyTiles) -> Iterator[int]:
    """Yield the lengths of the calls that feed `count` tokens.

    However long the feed, all the kept positions lie within its last `longest` tokens, so that only the cuts of `tiles`
    spread them over several calls.
    """
    while count > longest:
        length = min(longest, count - keep)
        yield from tiles.parts(begin, length)
        begin, count = begin + length, count - length
    yield from tiles.parts(begin, count)
