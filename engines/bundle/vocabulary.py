"""The meaning of token ids, and the ids that two models share."""

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

    Attributes:
        rows: The rows of the model's embedding.
        tokens: The token of each id, as `tokenizer.json` spells it.
        special: The ids of added and of reserved tokens, which models of one family may name differently. The other
            ids are ordinary tokens, into which text is encoded.
        beyond: The highest id of an ordinary token without a row in the model; None where all have one. Added tokens
            may lack a row, as that of an image does in a model of text.
    """

    rows: int
    tokens: Mapping[int, str]
    special: frozenset[int]
    beyond: int | None = None

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, rows: int) -> "Vocabulary":
        """Read a tokenizer's table.

        Args:
            tokenizer: The model's tokenizer.
            rows: The rows of the model's embedding. Tokens with an id beyond them are left out, as are the names that
                converters to GGUF give to rows without a token.
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
        """Read a bundle's `tokenizer.json`.

        Args:
            tokenizer_file: The file.
            rows: See `of`.
        """
        return cls.of(tokenizers.Tokenizer.from_file(str(tokenizer_file)), rows)


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """The token ids that two models have in common.

    Attributes:
        token_ids: int64[n], ascending, the ids that mean the same to both models, including rows that are padding in
            both.
        differing: The number of ids that are a token of one model and either no token or another one of the other.
    """

    token_ids: NDArray[np.int64]
    differing: int


def shared_tokens(target: Vocabulary, drafter: Vocabulary) -> SharedTokens:
    """Compare two models' vocabularies.

    Raises:
        VocabtrimError: An id is a different token in each model, and an ordinary token of at least one of them. Such
            models have unrelated vocabularies: the drafter cannot draft for the target.
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
    placeholder = _NO_TOKEN.fullmatch(token) if token[:1] in "[<" else None
    return placeholder is not None and token_id == int(placeholder[1] or placeholder[2])
