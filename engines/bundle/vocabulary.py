"""What each token id means, and which ids two models share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engines.errors import VocabtrimError

_SPACE = "\u2581"  # what SentencePiece writes for a space; GGUF files write some of them as spaces
_NO_TOKEN = re.compile(r"\[PAD(\d+)\]|<dummy0*(\d+)>")  # how converters name the rows that have no token
_RESERVED = re.compile(r"[<\[].*(unused|reserved|extra|dummy).*[>\]]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids that have both a token and a row in the model.

    rows: number of rows of the model's embedding. tokens: each id's token, as `tokenizer.json` spells it. special: the
    ids of added and of reserved tokens, which models of one family may name differently; the others are ordinary: text
    becomes them. beyond: the highest ordinary token's id that the model has no row for, None where there is none. An
    added token may lack a row, as an image's does in a model of text.
    """

    rows: int
    tokens: Mapping[int, str]
    special: frozenset[int]
    beyond: int | None = None

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, rows: int) -> "Vocabulary":
        """Read a tokenizer's table.

        Args:
            tokenizer: of the model.
            rows: number of rows of the model's embedding. Tokens with an id beyond them are left out, as are the
                names that converters to GGUF give to rows without a token.
        """
        table = tokenizer.get_vocab(with_added_tokens=True)
        tokens = {
            token_id: token.replace(" ", _SPACE)
            for token, token_id in table.items()
            if token_id < rows and not _is_placeholder(token, token_id)
        }
        added = tokenizer.get_added_tokens_decoder().keys()
        reserved = {token_id for token_id, token in tokens.items() if _RESERVED.fullmatch(token)}
        beyond = max((i for i in table.values() if i >= rows and i not in added), default=None)
        return cls(rows, tokens, frozenset(reserved | (added & tokens.keys())), beyond)

    @classmethod
    def load(cls, tokenizer_file: Path, rows: int) -> "Vocabulary":
        """Read a bundle's `tokenizer.json`. See `of`."""
        return cls.of(tokenizers.Tokenizer.from_file(str(tokenizer_file)), rows)


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """token_ids: int64[n], ascending, the ids that mean the same to both models; rows that both pad are among them.
    differing: number of the ids that are a token of one model and no token, or another one, of the other."""

    token_ids: NDArray[np.int64]
    differing: int


def shared_tokens(target: Vocabulary, drafter: Vocabulary) -> SharedTokens:
    """Compare two models' vocabularies.

    Raises:
        VocabtrimError: An id is a token of both, not the same one, and for at least one of them an ordinary token.
            Such models were trained on different text: no token of one says anything about the other's.
    """
    both = target.tokens.keys() & drafter.tokens.keys()
    unlike = {token_id for token_id in both if target.tokens[token_id] != drafter.tokens[token_id]}
    if ordinary := unlike - (target.special & drafter.special):
        token_id = min(ordinary)
        raise VocabtrimError(
            f"they have different vocabularies: {len(ordinary)} ordinary tokens differ, the first is {token_id}, "
            f"{target.tokens[token_id][:40]!r} to the target and {drafter.tokens[token_id][:40]!r} to the drafter"
        )
    if both == unlike:
        raise VocabtrimError("they have different vocabularies: no token of one is a token of the other")
    differing = unlike | (target.tokens.keys() ^ drafter.tokens.keys())
    rows = np.arange(min(target.rows, drafter.rows))
    return SharedTokens(np.setdiff1d(rows, np.fromiter(differing, np.int64)), len(differing))


def _is_placeholder(token: str, token_id: int) -> bool:
    found = _NO_TOKEN.fullmatch(token) if token[:1] in "[<" else None
    return found is not None and token_id == int(found[1] or found[2])
