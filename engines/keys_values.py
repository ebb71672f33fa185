"""`KeysValues`: a copy of what a KV cache holds, in the host's memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class KeysValues:
    """A copy of the first tokens' keys and values.

    Attributes:
        length: The tokens.
        arrays: [1, heads, length, size] by the names of the graph's inputs; none for an engine without a cache.
    """

    length: int
    arrays: Mapping[str, NDArray[np.generic]]

    @property
    def nbytes(self) -> int:
        """The size of the copy, in bytes."""
        return sum(array.nbytes for array in self.arrays.values())
