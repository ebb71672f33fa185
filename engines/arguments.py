"""Checks of numbers that callers pass: Python's, NumPy's and torch's scalars are accepted, all else is refused."""

from operator import index
from typing import Any

import numpy as np

from engines.errors import VocabtrimError

# logits are float32: a larger number would become infinite, a smaller one zero
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def whole_number(name: str, value: Any) -> int:
    """Returns the integer `value`.

    Args:
        name: The number's name, for the message.
        value: An int, or a scalar that stands for one.

    Raises:
        VocabtrimError: It is not an integer but a float, a text, None or a truth value.
    """
    try:
        if not isinstance(value, bool | np.bool_):
            return index(value)
    except TypeError:
        pass
    raise VocabtrimError(f"{name} is {value!r}: give a whole number")


def real_number(name: str, value: Any) -> float:
    """Returns `value`, any number, as a float.

    Args:
        name: The number's name, for the message.
        value: An int, a float, or a scalar that stands for one.

    Raises:
        VocabtrimError: It is not a number but a text, None or a truth value.
    """
    is_number = hasattr(type(value), "__float__") or hasattr(type(value), "__index__")
    try:
        if is_number and not isinstance(value, bool | np.bool_):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise VocabtrimError(f"{name} is {value!r}: give a number")
