"""The rotation of a `.gguf` file, where transformers does not read it."""

from typing import Any

import numpy as np

from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_header import GgufHeader
from vocabtrim_export.sources.gguf_weights import dequantize

_FIRST_CONTEXT = 8192  # Llama 3's; with these three constants one factor describes each release's rotation
_LOW, _HIGH = 1.0, 4.0
_BASE = 10000.0  # where a file states none


def rope_parameters(header: GgufHeader) -> dict[str, Any]:
    """Read the rotation of the file's layers; where a model also has layers with a window, that of the other layers.

    Llama 3.1 and later are described by a tensor of divisors. A factor whose kind is not stated divides positions, as
    in llama.cpp: files of 2023 have it under a name of its own.

    Returns:
        What the file states of transformers' `rope_parameters`; {} where it states nothing.

    Raises:
        VocabtrimError: The file scales its rotation in a way that transformers lacks.
    """
    stated = header.hyperparameters()
    base = {"rope_theta": float(stated["rope.freq_base"])} if stated.get("rope.freq_base") else {}
    scaling = stated.get("rope.scaling.type", "linear")
    factor = float(stated.get("rope.scaling.factor") or stated.get("rope.scale_linear") or 1.0)
    name = next((name for name in header.tensors if name.startswith("rope_")), None)
    is_linear = scaling == "linear" and factor != 1
    if scaling not in ("none", "linear") or (is_linear and name):
        raise VocabtrimError(
            f"{header.path} scales its rotation ({scaling}), which is not read: give the original weights"
        )
    if is_linear:
        return base | {"rope_type": "linear", "factor": factor}
    return base if name is None else _by_divisors(header, name, base.get("rope_theta", _BASE))


def _by_divisors(header: GgufHeader, name: str, base: float) -> dict[str, Any]:
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
