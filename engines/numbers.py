"""The number formats of engines, as NumPy arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Convert numbers to float32.

    Args:
        stored: float16, float32, or the bits of bfloat16 as uint16.
    """
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], dtype: np.dtype[np.generic]) -> NDArray[Any]:
    """Convert float32 numbers to the dtype that an engine stores, rounding to the nearest, ties to even.

    Args:
        values: The numbers.
        dtype: float16, float32, or uint16 for the bits of bfloat16.
    """
    if dtype != np.uint16:
        return values.astype(dtype, copy=False)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
