"""`VocabMap`: which tokens of the full vocabulary a trimmed head keeps."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engines.bundle.graph_io import TOKEN_TABLE
from engines.bundle.typed_json import brief
from engines.errors import VocabtrimError

NOT_KEPT = -1
MAX_VOCAB = 1 << 24  # far beyond any tokenizer; nothing is allocated for more


class HeadTokens(Protocol):
    """The interface to the token of each row of an LM head; `VocabMap` has fixed rows, slots change theirs."""

    @property
    def kept_token_ids(self) -> NDArray[np.int64]:
        """int64[rows]: the token of each row, `NOT_KEPT` for a row that is none at present."""

    @property
    def inverse(self) -> NDArray[np.int64]:
        """int64[full_vocab]: the row of each token, `NOT_KEPT` for one that has none."""


@dataclass(frozen=True, eq=False)
class VocabMap:
    """The kept token ids of a trimmed head: row `i` of the head is token `kept_token_ids[i]`.

    Attributes:
        kept_token_ids: int64[draft_vocab], absolute ids, strictly ascending, within `[0, full_vocab)`.
        full_vocab: Tokens of the full vocabulary.

    Raises:
        VocabtrimError: The ids do not have this form.
    """

    kept_token_ids: NDArray[np.int64]
    full_vocab: int

    def __post_init__(self) -> None:
        ids = np.ascontiguousarray(self.kept_token_ids)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise VocabtrimError("a VocabMap needs a non-empty list of integer token ids")
        ids = ids.astype(np.int64)  # a copy: nobody else can change it
        if not 0 < self.full_vocab <= MAX_VOCAB:
            raise VocabtrimError(f"a vocabulary has 1 to {MAX_VOCAB} tokens, not {str(self.full_vocab)[:40]}")
        if ids[0] < 0 or ids[-1] >= self.full_vocab:
            raise VocabtrimError(f"a VocabMap of a {self.full_vocab}-token vocabulary names ids outside it")
        if np.any(ids[1:] <= ids[:-1]):  # not their difference, which may overflow
            raise VocabtrimError("the token ids of a VocabMap must be sorted and unique")
        ids.setflags(write=False)
        object.__setattr__(self, "kept_token_ids", ids)

    @classmethod
    def from_ids(cls, ids: Iterable[int], full_vocab: int) -> "VocabMap":
        """Make a map of `ids`, which are sorted; repetitions are dropped."""
        return cls(np.unique(np.fromiter(ids, np.int64)), full_vocab)

    def __len__(self) -> int:
        return len(self.kept_token_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VocabMap) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def inverse(self) -> NDArray[np.int64]:
        """int64[full_vocab]: token id → head row, `NOT_KEPT` where the token was cut."""
        rows = np.full(self.full_vocab, NOT_KEPT, np.int64)
        rows[self.kept_token_ids] = np.arange(len(self))
        rows.setflags(write=False)
        return rows

    @cached_property
    def digest(self) -> str:
        """sha256 over the vocabulary size and the ids, both little-endian int64."""
        data = np.concatenate([[self.full_vocab], self.kept_token_ids]).astype("<i8").tobytes()
        return hashlib.sha256(data).hexdigest()

    def to_bytes(self) -> bytes:
        """Returns the safetensors form that `load` reads."""
        return save({TOKEN_TABLE: self.kept_token_ids}, {"full_vocab": str(self.full_vocab)})

    @classmethod
    def load(cls, path: Path) -> "VocabMap":
        """Read a safetensors file with `kept_token_ids: int64[draft_vocab]` and `full_vocab` in its metadata.

        Raises:
            VocabtrimError: The file is something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                ids, full_vocab = file.get_tensor(TOKEN_TABLE), int(file.metadata()["full_vocab"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise VocabtrimError(f"{path} is not a VocabMap file ({brief(error)})") from error
        return cls(ids, full_vocab)
