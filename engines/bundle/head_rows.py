"""`HeadRows`: the rows that a trimmed head lacks, in a file that is mapped into memory and read row by row."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from engines.bundle.graph_io import TOKEN_IDS
from engines.bundle.typed_json import brief
from engines.bundle.vocab_map import NOT_KEPT, VocabMap
from engines.errors import VocabtrimError
from engines.numbers import to_float32

_BLOCKS = (32, 64, 128)  # how many numbers of a row share a scale
_BITS = {"int8": 8, "int4": 4}
_FLOATS = ("F32", "F16", "U16")  # U16: the bits of bfloat16, which NumPy lacks


class HeadRows:
    """The rows of an LM head for the tokens that are not in `vocab_map`.

    Attributes:
        index: int64[full_vocab], token id → row of the file, `NOT_KEPT` for a token without a row in it.
        has_bias: Each row has a bias.
    """

    def __init__(self, path: Path, vocab_map: VocabMap, quantization: str) -> None:
        """Open a file of rows.

        Args:
            path: The safetensors file.
            vocab_map: The tokens that the head keeps.
            quantization: "none", "int8" or "int4".

        Raises:
            VocabtrimError: The file does not hold rows of this quantisation for tokens outside the map.
        """
        self._bits = _BITS.get(quantization)
        try:
            file: Any = safe_open(path, framework="numpy")  # mapped into memory, and read by `read`
            names = set(file.keys())
            token_ids = file.get_tensor(TOKEN_IDS)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise VocabtrimError(f"{path} is not a file of head rows ({brief(error)}): export again") from error
        self.has_bias = "bias" in names
        parts = ("weight",) if self._bits is None else ("quantized", "scales", "zero_points")
        if names != {TOKEN_IDS, *parts, *(["bias"] if self.has_bias else [])}:
            raise VocabtrimError(f"{path} does not hold the rows of a head that is {quantization}: export again")
        self._parts = {name: file.get_slice(name) for name in names - {TOKEN_IDS}}
        self.index = _index(token_ids, vocab_map, path)
        self._block = 1 if self._bits is None else self._block_of(path)
        self._size = self._check_shapes(len(token_ids), path)

    def holds(self, hidden: int) -> bool:
        """Returns whether the rows fit a model with this hidden size."""
        return 0 <= self._size - hidden < self._block

    def read(self, token_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read and dequantise rows.

        Args:
            token_ids: int64[n], tokens with a row.

        Returns:
            The weights float32[n, size], and the biases float32[n], zeros where there are none. Quantised weights are
            dequantised as the head's product does it, (q - zero point) · scale; `size` is then the hidden size rounded
            up to whole blocks.
        """
        rows = self.index[token_ids].tolist()
        read = {name: np.stack([part[row] for row in rows]) for name, part in self._parts.items()}
        bias = to_float32(read["bias"]) if self.has_bias else np.zeros(len(rows), np.float32)
        if self._bits is None:
            return to_float32(read["weight"]), bias
        scales = to_float32(read["scales"])
        values, zeros = read["quantized"], read["zero_points"]
        if self._bits == 4:
            values, zeros = _nibbles(values), _nibbles(zeros)
        zeros = zeros[:, : scales.shape[1], None].astype(np.float32)
        weights = (values.astype(np.float32) - zeros) * scales[:, :, None]
        return weights.reshape(len(rows), -1), bias

    def _block_of(self, path: Path) -> int:
        """Returns how many numbers share a scale."""
        shape = self._parts["quantized"].get_shape()
        block = shape[-1] * 8 // (self._bits or 8) if shape else 0
        if block not in _BLOCKS:
            raise VocabtrimError(f"{path} has blocks of {block} numbers, which no head has: export again")
        return block

    def _check_shapes(self, rows: int, path: Path) -> int:
        """Returns the numbers in a row."""
        shapes = {name: tuple(part.get_shape()) for name, part in self._parts.items()}
        dtypes = {name: part.get_dtype() for name, part in self._parts.items()}
        count = shapes.get("scales", (0, 0))[-1]
        bits = self._bits or 0
        wanted: dict[str, tuple[int, ...]] = {
            "weight": (rows, shapes.get("weight", (0, 0))[-1]),
            "quantized": (rows, count, self._block * bits // 8),
            "scales": (rows, count),
            "zero_points": (rows, -(-count * bits // 8)),
            "bias": (rows,),
        }
        bytes_of = {"quantized", "zero_points"}
        for name, shape in shapes.items():
            if shape != wanted[name] or dtypes[name] not in (("U8",) if name in bytes_of else _FLOATS):
                raise VocabtrimError(f"{path}: {name} is {dtypes[name]}{list(shape)}, which no head has: export again")
        return wanted["weight"][1] if self._bits is None else count * self._block


def _index(token_ids: NDArray[Any], vocab_map: VocabMap, path: Path) -> NDArray[np.int64]:
    index = np.full(vocab_map.full_vocab, NOT_KEPT, np.int64)
    is_list = token_ids.ndim == 1 and token_ids.dtype == np.int64
    if not is_list or np.any(token_ids < 0) or np.any(token_ids >= vocab_map.full_vocab):
        raise VocabtrimError(f"{path} names tokens outside the vocabulary: export again")
    index[token_ids] = np.arange(len(token_ids))
    if np.count_nonzero(index != NOT_KEPT) != len(token_ids) or np.any(index[vocab_map.kept_token_ids] != NOT_KEPT):
        raise VocabtrimError(f"{path} has a row twice, or one that the head keeps: export again")
    return index


def _nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Unpack two 4-bit values of each byte, the low one first, along the last axis."""
    return np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
