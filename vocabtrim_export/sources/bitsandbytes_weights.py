"""Weights as bitsandbytes stores them: 4-bit numbers by a table (nf4, fp4), or int8 rows (LLM.int8)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.bundle.typed_json import decode, parse

ABSMAX = "weight.absmax"  # of 4 bits: the largest magnitude of each block
ROW_SCALES = "SCB"  # of int8: the largest magnitude of each row
_STATE = "weight.quant_state.bitsandbytes__"
_INT8_MOST = 127
PARTS = frozenset(
    {ROW_SCALES, "weight_format", ABSMAX, "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"}
    | {_STATE + kind for kind in ("nf4", "fp4")}
)


def dequantize(parts: Mapping[str, Tensor], _quantization: Mapping[str, Any]) -> Tensor:
    """Returns the dense weight, float32[out, in], of a linear layer.

    Args:
        parts: Its tensors by what stands behind the layer's name. `weight` is int8[out, in], with the largest magnitude
            of each row in `SCB`, or uint8 with two numbers a byte, the first in the high nibble, in blocks along the
            rows of the flattened weight.

    Raises:
        KeyError: A part is missing.
        IndexError: The parts do not belong together.
    """
    if ROW_SCALES in parts:
        return _rows(parts)
    state = next((parts[name] for name in parts if name.startswith(_STATE)), None)
    if state is None:
        raise KeyError("weight.quant_state")
    stated = decode(Mapping[str, Any], parse(bytes(state.tolist()).decode(), _STATE), _STATE)
    packed = parts["weight"].flatten().view(torch.uint8)  # which may be stored as another dtype
    largest = _largest(parts, stated)
    values = parts["weight.quant_map"].float()[torch.stack([packed >> 4, packed & 15], -1).flatten().long()]
    shape, size = list(stated["shape"]), int(stated["blocksize"])
    count = math.prod(shape)
    if not count <= len(values) <= count + 1 or len(largest) != -(-count // size):
        raise IndexError(f"{len(packed)} bytes and {len(largest)} blocks of {size} do not make {shape}")
    dense: Tensor = values[:count] * largest.repeat_interleave(size)[:count]
    return dense.view(shape)


def _rows(parts: Mapping[str, Tensor]) -> Tensor:
    weight, largest = parts["weight"], parts[ROW_SCALES].float()
    if (
        weight.dtype != torch.int8
        or weight.shape[:1] != largest.shape
        or int(parts.get("weight_format", torch.tensor(0)))
    ):
        raise IndexError(f"{list(weight.shape)} numbers with {list(largest.shape)} scales, in another layout than rows")
    dense: Tensor = weight.float() * (largest / _INT8_MOST)[:, None]
    return dense


def _largest(parts: Mapping[str, Tensor], stated: Mapping[str, Any]) -> Tensor:
    """Returns the largest magnitude of each block, float32; it may be quantised itself, around a mean."""
    largest = parts[ABSMAX]
    if "weight.nested_absmax" not in parts:
        return largest.float()
    values = parts["weight.nested_quant_map"].float()[largest.long()]
    scales = parts["weight.nested_absmax"].float().repeat_interleave(int(stated["nested_blocksize"]))[: len(values)]
    return values * scales + float(stated["nested_offset"])
