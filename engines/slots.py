"""`Slots`: the tokens in the in-context slots of a drafter's head."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.bundle.graph_io import SLOT_BIAS, SLOT_INPUTS, SLOT_TOKEN_IDS, SLOT_WEIGHT
from engines.bundle.head_rows import HeadRows
from engines.bundle.manifest import HEAD_ROWS_NAME
from engines.bundle.read import Bundle
from engines.bundle.vocab_map import NOT_KEPT, VocabMap
from engines.errors import VocabtrimError
from engines.numbers import from_float32


def open_head_rows(bundle: Bundle, inputs: Mapping[str, Sequence[int | str]], columns: int) -> HeadRows | None:
    """Open the rows that may enter the slots of a bundle's graph; None where it has no slots.

    Args:
        bundle: The bundle.
        inputs: The shapes of the graph's inputs by name.
        columns: Columns of its logits.

    Raises:
        VocabtrimError: The graph's slots are not those of the manifest, or of the file of rows.
    """
    count, vocab_map = bundle.manifest.slots, bundle.vocab_map
    shapes = {name: tuple(inputs[name]) for name in SLOT_INPUTS if name in inputs}
    if not count and not shapes:
        return None
    hidden = shapes.get(SLOT_WEIGHT, (0,))[0]
    if vocab_map is not None and isinstance(hidden, int):
        rows = HeadRows(bundle.path / HEAD_ROWS_NAME, vocab_map, bundle.manifest.head_rows_quantization)
        wanted = {SLOT_WEIGHT: (hidden, count), SLOT_TOKEN_IDS: (count,)}
        wanted |= {SLOT_BIAS: (count,)} if rows.has_bias else {}
        if shapes == wanted and rows.holds(hidden) and columns == len(vocab_map) + count:
            return rows
    raise VocabtrimError(
        f"the slots of the graph in {bundle.path} are not those that {HEAD_ROWS_NAME} is for: export again"
    )


class Slots:
    """The M in-context slots of a head: columns for tokens that it lacks. A new token replaces the least recent one.

    Attributes:
        kept_token_ids: int64[K + M], the token of each column of the logits, `NOT_KEPT` for an empty slot. It changes
            with the slots.
        inverse: int64[full_vocab], the column of each token, `NOT_KEPT` for a token without one. It changes too.
    """

    def __init__(
        self, vocab_map: VocabMap, rows: HeadRows, shape: tuple[int, int], dtype: np.dtype[np.generic]
    ) -> None:
        """Make empty slots.

        Args:
            vocab_map: The K kept tokens.
            rows: The head's rows of all tokens.
            shape: The shape of the graph's input slot_weight, (hidden, M).
            dtype: The dtype of that input; uint16 holds the bits of bfloat16.
        """
        count = shape[1]
        self._rows, self._count, self._kept = rows, count, len(vocab_map)
        self.kept_token_ids = np.concatenate([vocab_map.kept_token_ids, np.full(count, NOT_KEPT, np.int64)])
        self.inverse = vocab_map.inverse.copy()
        self._weight, self._bias = np.zeros(shape, dtype), np.zeros(count, dtype)
        self._token_ids = self.kept_token_ids[self._kept :]
        self._slot_of: dict[int, int] = {}  # token → slot, the least recently seen first

    @property
    def inputs(self) -> Mapping[str, NDArray[np.generic]]:
        """The graph's inputs by name. A session that is bound to these arrays sees every change."""
        bias = {SLOT_BIAS: self._bias} if self._rows.has_bias else {}
        return {SLOT_WEIGHT: self._weight, SLOT_TOKEN_IDS: self._token_ids, **bias}

    def clear(self) -> None:
        """Empty all slots."""
        self.inverse[list(self._slot_of)] = NOT_KEPT
        self._token_ids.fill(NOT_KEPT)
        self._slot_of.clear()

    def see(self, token_ids: Sequence[int]) -> None:
        """Give a slot to those of these tokens, in the order of the text, that the head lacks.

        Only the last M distinct ones are read from the file, whatever the length of the text.
        """
        ids = np.asarray(token_ids, np.int64)
        ids = ids[ids < len(self.inverse)]
        ids = ids[self._rows.index[ids] != NOT_KEPT]
        latest = list(dict.fromkeys(reversed(ids.tolist())))[: self._count][::-1]
        staying = {token: self._slot_of.pop(token) for token in latest if token in self._slot_of}
        entering = [token for token in latest if token not in staying]
        slots = self._free(len(entering), used=len(staying))
        staying |= zip(entering, slots, strict=True)
        self._slot_of |= {token: staying[token] for token in latest}
        if entering:
            self._write(np.array(entering), np.array(slots))

    def _free(self, count: int, used: int) -> list[int]:
        """Returns `count` slots, and empties the least recently seen ones where too few are free.

        Args:
            count: The number of slots to return.
            used: The number of slots that hold a token but are missing from `_slot_of` at the moment.
        """
        taken = len(self._slot_of) + used
        slots = list(range(taken, min(taken + count, self._count)))  # they are first taken in order
        while len(slots) < count:
            oldest = next(iter(self._slot_of))
            slots.append(self._slot_of.pop(oldest))
            self.inverse[oldest] = NOT_KEPT
        return slots

    def _write(self, token_ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        weights, biases = self._rows.read(token_ids)
        self._weight[:, slots] = from_float32(weights.T[: len(self._weight)], self._weight.dtype)
        self._bias[slots] = from_float32(biases, self._bias.dtype)
        self._token_ids[slots] = token_ids
        self.inverse[token_ids] = self._kept + slots
