"""The size of a bundle before it is written."""

from typing import Any

_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
_QUANTIZED_BYTES = {"int8": 1.16, "int4": 0.67}  # a weight, with a scale and a zero point for each block of 32, fp32


def bundle_bytes(model: Any, dtype: str, quantization: str, rows: int | None) -> float:
    """Returns the approximate bytes of the weights of a language model's bundle.

    Args:
        model: The model.
        dtype: The bundle's dtype.
        quantization: Its quantisation.
        rows: The rows that its head keeps; None for all.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = sum(p.numel() for p in model.parameters()) - embedding.numel()
    layers -= 0 if head is embedding else head.numel()
    product = _QUANTIZED_BYTES.get(quantization, _BYTES[dtype])
    is_blocks = quantization != "none" and dtype == "fp32"
    row = _QUANTIZED_BYTES["int8"] if is_blocks else _BYTES[dtype]
    is_once = rows is None and head is embedding and row == product and dtype == "fp32"
    kept = 0 if is_once else (head.shape[0] if rows is None else rows) * head.shape[1]
    return float(embedding.numel() * row + (layers + kept) * product)
