"""Read the token of each row of a head's LM head from `d2t` and `t2d`, as trainers write them."""

import numpy as np
from numpy.typing import NDArray

from engines.errors import VocabtrimError


def row_token_ids(
    d2t: NDArray[np.generic] | None, t2d: NDArray[np.generic] | None, rows: int, vocab_size: int, where: str
) -> NDArray[np.int64]:
    """Returns the token of each row of a head: int64[rows], in any order.

    Args:
        d2t: Integers [rows], offsets: row i is token i + d2t[i]. They are absolute ids only where `t2d` shows it.
        t2d: [vocab_size], true for the tokens that have a row. Without `d2t` the rows are these tokens in ascending
            order, or, where there are as many rows as tokens, row i is token i.
        rows: Rows of the LM head.
        vocab_size: Tokens of the target.
        where: The checkpoint, for messages.

    Raises:
        VocabtrimError: The tables do not name `rows` different tokens of the vocabulary.
    """
    listed = None if t2d is None else _listed(t2d, vocab_size, where)
    if d2t is None:
        if rows == vocab_size:
            return np.arange(rows)
        if listed is None:
            raise VocabtrimError(
                f"{where} has {rows} rows for a vocabulary of {vocab_size} tokens, but no d2t that says which tokens "
                "they are: give the whole checkpoint"
            )
        return _checked(listed, rows, vocab_size, f"{where}: t2d")
    if d2t.shape != (rows,) or not np.issubdtype(d2t.dtype, np.integer):
        raise VocabtrimError(
            f"{where}: d2t is {d2t.dtype}{list(d2t.shape)}, and the head's {rows} rows need as many integers: the "
            "checkpoint is damaged"
        )
    stated = d2t.astype(np.int64)
    ids = np.arange(rows) + stated
    if listed is not None and not np.array_equal(np.sort(ids), listed):
        if not np.array_equal(np.sort(stated), listed):
            raise VocabtrimError(f"{where}: d2t and t2d name different tokens: the checkpoint is damaged")
        ids = stated
    return _checked(ids, rows, vocab_size, f"{where}: d2t")


def _listed(t2d: NDArray[np.generic], vocab_size: int, where: str) -> NDArray[np.int64]:
    if t2d.shape != (vocab_size,):
        raise VocabtrimError(
            f"{where}: t2d has shape {list(t2d.shape)}, and the vocabulary {vocab_size} tokens: the checkpoint is "
            "damaged"
        )
    return np.flatnonzero(t2d)


def _checked(ids: NDArray[np.int64], rows: int, vocab_size: int, where: str) -> NDArray[np.int64]:
    if len(ids) != rows:
        raise VocabtrimError(f"{where} names {len(ids)} tokens, the head has {rows} rows: the checkpoint is damaged")
    if ids.min() < 0 or ids.max() >= vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise VocabtrimError(
            f"{where} names the token {worst}, which is outside the vocabulary of {vocab_size}: the checkpoint is "
            "damaged"
        )
    if len(np.unique(ids)) < rows:
        raise VocabtrimError(f"{where} names a token twice: the checkpoint is damaged")
    return ids
