"""Emits one composite operator of a traced graph."""

from typing import Any

from torch import Tensor
from torch.onnx.ops import symbolic

DOMAIN = "vocabtrim"


def emit(op: str, inputs: list[Any], shape: Any, **attributes: Any) -> Tensor:
    """Emit the composite `op`, whose one output has this shape and the dtype of its first input."""
    output: Tensor = symbolic(f"{DOMAIN}::{op}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=1)
    return output
