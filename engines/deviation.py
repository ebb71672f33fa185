"""The difference between a graph's output and its model's, and the part of it that rounding explains."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# The largest difference of an output that rounding explains, as a share of the standard deviation of what is expected,
# by the dtype of the weights. It is larger for rounded weights, since the graph rounds some constants (a rotary table,
# a norm's weight plus 1) that the model computes in float32.
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 4e-2}


def deviation(computed: NDArray[Any], wanted: NDArray[np.float32]) -> float:
    """Returns the largest difference, as a share of the standard deviation of the finite numbers in `wanted`.

    It is infinite where shapes differ, or where one of the two is infinite and the other is not.

    Args:
        computed: The graph's output, of any shape and dtype.
        wanted: The model's values, of the same shape.
    """
    finite = np.isfinite(wanted)
    if computed.shape != wanted.shape or not np.array_equal(computed[~finite], wanted[~finite]):
        return float("inf")
    spread = max(float(wanted[finite].std()), 1e-30) if finite.any() else 1.0
    return float(np.abs(computed[finite] - wanted[finite]).max(initial=0.0) / spread)
