"""Drafts for free: what followed the last tokens where they stood in the text before."""

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.shares import Shares

_SIZES = (6, 4, 3, 2)  # lengths of the n-grams that are looked for, the longest first
_LONGEST_MATCH = 32  # tokens before it that a match is compared for
_EDGES = (3, 4, 6, 9, 16, 32)  # between bins of the match's length
LOOKUP_PRIORS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.9)  # the assumed share of right tokens in each bin


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier place of the text's last tokens.

    Attributes:
        tokens: The tokens that followed there.
        chances: For each of them, the running share of such tokens that were right where all before them were.
    """

    tokens: tuple[int, ...]
    chances: tuple[float, ...]


NO_MATCH = Match((), ())


class PromptLookup:
    """An index of the text's n-grams, which grows with the text; the text is never searched.

    Saxena 2023, "Prompt Lookup Decoding". Every match is judged by what then came, whether it was drafted or not, so
    that `shares` follows the text at no cost.
    """

    def __init__(self, prompt: Iterable[int], longest: int, shares: Shares) -> None:
        """Index a prompt.

        Args:
            prompt: Token ids.
            longest: The most tokens of a match.
            shares: The shares of right tokens by the length of their match, which start at LOOKUP_PRIORS. They outlive
                the text.
        """
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the token after the last place of an n-gram stands
        self._longest, self._shares = longest, shares
        self._add(prompt)
        self._length, self._tokens = self._find()

    def match(self) -> Match:
        """Returns the match of the text as it is; NO_MATCH where its last two tokens are new."""
        if not self._tokens:
            return NO_MATCH
        bins = (_bin(self._length + i) for i in range(len(self._tokens)))
        return Match(self._tokens, tuple(self._shares[index] for index in bins))

    def extend(self, tokens: Iterable[int]) -> None:
        """Append `tokens` to the text."""
        tokens = list(tokens)
        for i, (looked_up, token) in enumerate(zip(self._tokens, tokens, strict=False)):
            self._shares.count(_bin(self._length + i), looked_up == token)
            if looked_up != token:
                break
        self._add(tokens)
        self._length, self._tokens = self._find()

    def _add(self, tokens: Iterable[int]) -> None:
        text = self._text
        for token in tokens:
            for size in _SIZES:
                if size <= len(text):
                    self._after[tuple(text[-size:])] = len(text)
            text.append(token)

    def _find(self) -> tuple[int, tuple[int, ...]]:
        """Returns the length of the match and the tokens that followed."""
        text = self._text
        for size in _SIZES:
            after = self._after.get(tuple(text[-size:])) if size <= len(text) else None
            if after is not None:
                end = len(text)
                while size < _LONGEST_MATCH and size < after and text[after - size - 1] == text[end - size - 1]:
                    size += 1
                period = end - after  # a match that reaches the text's end goes on with what it gave
                return size, tuple(text[after + i % period] for i in range(self._longest))
        return 0, ()


def _bin(length: int) -> int:
    return bisect(_EDGES, length)
