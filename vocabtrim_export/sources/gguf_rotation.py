"""The rotation of a `.gguf` file, where transformers does not read it."""

from typing import Any

import numpy as np

from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_header import GgufHeader
from vocabtrim_export.sources.gguf_weights import dequantize

_FIRST_CONTEXT = 8192  # Llama 3's; with these three constants one factor describes each release's rotation
_LOW, _HIGH = 1.0, 4.0
_BASE = 10000.0  # where a file states none


def rope_parameters(header: GgufHeader) -> dict[str, Any] | None:
    """Read the rotation of Llama 3.1 and later, which their files describe by a tensor of divisors.

    Returns:
        transformers' `rope_parameters`; None where the file has no such tensor.

    Raises:
        VocabtrimError: The file scales its rotation in a way that transformers lacks.
    """
    stated = header.hyperparameters()
    scaling = stated.get("rope.scaling.type", "none")
    if scaling != "none":
        raise VocabtrimError(
            f"{header.path} scales its rotation ({scaling}), which is not read: give the original weights"
        )
    name = next((name for name in header.tensors if name.startswith("rope_")), None)
    if name is None:
        return None
    base = float(stated.get("rope.freq_base", _BASE))
    divisors = dequantize(header, name).ravel()
    factor = float(divisors.max())
    wanted = _divisors(len(divisors), base, factor)
    if name != "rope_freqs.weight" or not np.allclose(divisors, wanted):
        raise VocabtrimError(f"{header.path} turns by {name}, not as Llama 3 does: give the original weights")
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _FIRST_CONTEXT,
    }


def _divisors(half: int, base: float, factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the divisor of each frequency: 1 where it turns more than `_HIGH` times in the first context.

    It is `factor` where it turns less than `_LOW` times, and between them in between.
    """
    turns = _FIRST_CONTEXT / (2 * np.pi * base ** (np.arange(half) / half))
    share = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    divisors: np.ndarray[Any, np.dtype[np.float64]] = 1 / ((1 - share) / factor + share)
    return divisors
