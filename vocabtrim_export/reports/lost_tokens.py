"""Tokens that a trimmed head lacks, and their places in a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from engines.bundle.tokenizer import Tokenizer
from vocabtrim_export.calibration import TokenCounts

MOST_TOKENS = 40
_LINES, _LINE_LENGTH = 4, 240  # how many lines of a text are shown, and the characters of each


@dataclass(frozen=True, slots=True)
class LostToken:
    """A token that the head lacks.

    Attributes:
        token_id: Its id.
        text: Its text, with escapes for characters that do not show.
        seen: The calibration's count of it, with the weights of domains.
        share: `seen` over all counted tokens.
        domain: The domain in which it has the largest share; "" without domains.
    """

    token_id: int
    text: str
    seen: int
    share: float
    domain: str


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """The calibration's tokens that the head keeps and lacks.

    Attributes:
        rows: Tokens that the head keeps.
        counted: Those of them that were counted.
        lost: Tokens that it lacks.
        lost_counted: Those of them that were counted.
        lost_share: Their share of all counted tokens.
        most_lost: The most frequent of them.
    """

    rows: int
    counted: int
    lost: int
    lost_counted: int
    lost_share: float
    most_lost: tuple[LostToken, ...]


@dataclass(frozen=True, slots=True)
class MarkedLine:
    """A line of a text in which the head lacks tokens.

    Attributes:
        domain: The name of the text.
        parts: Pieces of the line, and whether the head lacks tokens of a piece.
        lost: Tokens of the line that the head lacks.
        tokens: All tokens of the line.
    """

    domain: str
    parts: tuple[tuple[str, bool], ...]
    lost: int
    tokens: int


def kept_tokens(counts: TokenCounts, kept: NDArray[np.int64], tokenizer: Tokenizer) -> KeptTokens:
    """Sum up what a head keeps and lacks.

    Args:
        counts: The calibration's counts, of the full vocabulary.
        kept: int64[K], the ids of the head's rows.
        tokenizer: The drafter's tokenizer.
    """
    seen = counts.counts + counts.held_out
    is_kept = np.zeros(len(seen), np.bool_)
    is_kept[kept] = True
    total = max(1, int(seen.sum()))
    lost_seen = np.where(is_kept, 0, seen)
    order = np.argsort(-lost_seen, kind="stable")[:MOST_TOKENS]
    most = tuple(
        LostToken(
            int(token),
            token_text(tokenizer, int(token)),
            int(seen[token]),
            int(seen[token]) / total,
            _domain_of(counts, int(token)),
        )
        for token in order
        if lost_seen[token]
    )
    return KeptTokens(
        len(kept),
        int(np.count_nonzero(seen[is_kept])),
        int(np.count_nonzero(~is_kept)),
        int(np.count_nonzero(lost_seen)),
        int(lost_seen.sum()) / total,
        most,
    )


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Returns a token in readable form: its text in quotes, or the tokenizer's name for a part of a character."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        text = tokenizer.backend.id_to_token(token_id) or ""
    return f'"{visible(text)}"'


def visible(text: str) -> str:
    """Returns the text with escapes for characters that do not show, such as line ends and marks of direction."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def marked_lines(
    domain: str, texts: Sequence[str], tokenizer: Tokenizer, is_kept: NDArray[np.bool_]
) -> tuple[MarkedLine, ...]:
    """Returns the lines of some texts with the most tokens that the head lacks, those with the most first.

    Args:
        domain: The name of the texts.
        texts: The texts.
        tokenizer: The drafter's tokenizer.
        is_kept: bool[vocabulary].
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    marked = [_mark(domain, line[:_LINE_LENGTH], tokenizer, is_kept) for line in dict.fromkeys(lines)]
    hurt = sorted((line for line in marked if line.lost), key=lambda line: (-line.lost, line.tokens))
    return tuple(hurt[:_LINES])


def _mark(domain: str, line: str, tokenizer: Tokenizer, is_kept: NDArray[np.bool_]) -> MarkedLine:
    encoding = tokenizer.backend.encode(line, add_special_tokens=False)
    lost = [not (token < len(is_kept) and is_kept[token]) for token in encoding.ids]
    is_lost = np.zeros(len(line), np.bool_)
    for (start, end), is_one in zip(encoding.offsets, lost, strict=True):
        is_lost[start:end] |= is_one
    pieces = groupby(zip(line, is_lost.tolist(), strict=True), key=lambda each: each[1])
    parts = tuple((visible("".join(letter for letter, _ in piece)), mark) for mark, piece in pieces)
    return MarkedLine(domain, parts, sum(lost), len(lost))


def _domain_of(counts: TokenCounts, token: int) -> str:
    shares = {
        each.runs[0].domain: int(each.counts[token] + each.held_out[token]) / max(1, each.total)
        for each in counts.domains
    }
    return max(shares, key=lambda name: shares[name], default="")
