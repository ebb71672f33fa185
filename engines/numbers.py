"""What engines store numbers as."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Logits as float32, from float16, float32, or the bits of bfloat16 as uint16."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
