"""The rotation of a `.gguf` file, where transformers does not read it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_header import GgufHeader
from vocabtrim_export.sources.gguf_weights import dequantize

_FIRST_CONTEXT = 8192  # Llama 3's; with these three constants one factor describes each release's rotation
_LOW, _HIGH = 1.0, 4.0
_BASE = 10000.0  # where a file states none
_LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
_ATTENTION = "rope.scaling.attn_factor"  # of the rotated queries and keys
_YARN_FACTORS = ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor")  # 1 in transformers; -1 is not set


def rope_parameters(header: GgufHeader) -> dict[str, Any]:
    """Read the rotation of the file's layers; where a model also has layers with a window, that of the other layers.

    Llama 3.1 and later are described by a tensor of divisors, LongRoPE by two. A factor whose kind is not stated
    divides positions, as in llama.cpp: files of 2023 have it under a name of its own.

    Returns:
        What the file states of transformers' `rope_parameters`; {} where it states nothing.

    Raises:
        VocabtrimError: The file scales its rotation in a way that transformers lacks.
    """
    stated = header.hyperparameters()
    base = {"rope_theta": float(stated["rope.freq_base"])} if stated.get("rope.freq_base") else {}
    scaling = stated.get("rope.scaling.type", "linear")
    factor = float(stated.get("rope.scaling.factor") or stated.get("rope.scale_linear") or 1.0)
    tensors = {name for name in header.tensors if name.startswith("rope_")}
    if tensors == set(_LONGROPE) and scaling in ("linear", "longrope") and factor == 1:
        return base | _longrope(header)
    if scaling == "yarn" and not tensors and all(stated.get(key, 1.0) in (1, -1) for key in _YARN_FACTORS):
        return base | _yarn(stated, factor)
    is_linear = scaling == "linear" and factor != 1
    if scaling not in ("none", "linear") or (is_linear and tensors) or stated.get(_ATTENTION, 1.0) not in (0, 1):
        raise VocabtrimError(
            f"{header.path} scales its rotation ({scaling}), which is not read: give the original weights"
        )
    if is_linear:
        return base | {"rope_type": "linear", "factor": factor}
    return _by_divisors(header, min(tensors), base.get("rope_theta", _BASE)) if tensors else base


def _yarn(stated: Mapping[str, Any], factor: float) -> dict[str, Any]:
    attention = float(stated.get(_ATTENTION, 1.0)) * (1 + 0.1 * math.log(max(1.0, factor)))
    betas = {name: stated.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": attention,
        "original_max_position_embeddings": _first_context(stated),
        **{name: float(value) for name, value in betas.items() if value is not None},
    }


def _longrope(header: GgufHeader) -> dict[str, Any]:
    stated = header.hyperparameters()
    short, long = (dequantize(header, name).ravel().tolist() for name in _LONGROPE)
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": float(stated.get(_ATTENTION, 1.0)),
        "original_max_position_embeddings": _first_context(stated),
    }


def _first_context(stated: Mapping[str, Any]) -> int:
    return int(stated.get("rope.scaling.original_context_length") or stated.get("context_length", 0))


def _by_divisors(header: GgufHeader, name: str, base: float) -> dict[str, Any]:
    divisors = dequantize(header, name).ravel()
    factor = float(divisors.max())
    wanted = _divisors(len(divisors), base, factor)
    if name != "rope_freqs.weight" or not np.allclose(divisors, wanted):
        raise VocabtrimError(
            f"{header.path} scales its rotation by {name} in another way than Llama 3: give the original weights"
        )
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
