"""The numbers of keys at which attention on the CPU adds in another order, for heads of more than 128 numbers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

_SPLIT = 8192  # numbers: a float32 product of MLAS with at most n columns adds up to 8192 / n numbers in one go …
_FEW_COLUMNS = (64, 32, 16)  # … for these n, and 128 with more columns

_SC_LEVEL2_CACHE_SIZE = 191  # in glibc's unistd.h; os.sysconf_names lacks it


@dataclass(frozen=True, slots=True)
class KeyTiles:
    """The tiles of keys that `GroupQueryAttention` multiplies a query with.

    A tile of more columns than fit adds a head's products in two or more parts. The last tile of a call grows with the
    call's tokens, so a token's scores would depend on the tokens after it. No call may then cross a cut: the token that
    makes a tile too wide begins a call of its own.

    Attributes:
        size: Keys in a tile.
        cuts: Places in a tile where a call must begin, counted from the tile's first key, ascending.
    """

    size: int
    cuts: tuple[int, ...]

    @classmethod
    def of(cls, head_dim: int) -> "KeyTiles":
        """Returns the tiles of this machine; without cuts where nothing is split."""
        try:
            cache = os.sysconf(_SC_LEVEL2_CACHE_SIZE)  # bytes; ONNX Runtime asks for the same number
        except (AttributeError, OSError):  # another system, another C library
            cache = 0
        size = max(1, cache // (4 * 4 * 2 * head_dim))  # a quarter of it holds a float32 tile of keys and one of values
        wide = [columns for columns in _FEW_COLUMNS if head_dim * columns > _SPLIT and columns < size]
        # A lone row is padded by one more, so the cut lies one token before the tile is too wide.
        return cls(size, tuple(sorted(columns - 1 for columns in wide)))

    def parts(self, begin: int, length: int) -> Iterator[int]:
        """Yield the lengths of the calls that feed `length` tokens after `begin` cached ones."""
        end = begin + length
        while begin < end:
            tile = begin - begin % self.size
            later = [tile + cut for cut in self.cuts] + [tile + self.size + cut for cut in self.cuts[:1]]
            stop = min([end, *(cut for cut in later if cut > begin)])
            yield stop - begin
            begin = stop


UNCUT = KeyTiles(1, ())
