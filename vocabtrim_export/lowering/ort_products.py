"""Weight-only quantisation: Linear and Head composites → MatMul, or MatMulNBits with int4 or int8 blocks."""

import math

import onnx_ir as ir
import torch
from torch import Tensor

from vocabtrim_export.lowering.graph import DecoderGraph, name_of
from vocabtrim_export.lowering.nodes import CONTRIB
from vocabtrim_export.lowering.quantize import BITS, Quantization, block_size, quantize_blocks
from vocabtrim_export.lowering.weights import Parts, Weight


def lower_products(decoder: DecoderGraph, quantization: Quantization) -> list[str]:
    """Turn every Linear and Head into `MatMul` or, quantised, `MatMulNBits`; a bias becomes an `Add`.

    Returns:
        The names of the initializers that the head, or all heads, read.
    """
    head_weights: list[str] = []
    for node in [*decoder.composites("Linear"), *decoder.composites("Head")]:
        x, weight, *bias = node.inputs
        assert x is not None
        name = name_of(weight)
        dense = decoder.weights[name]
        if "transposed" in node.attributes:
            dense = dense.transposed()  # now [out, in]
        if quantization == "none" and _is_shared(decoder, node):
            product = ir.node("FusedMatMul", [x, weight], {"transB": 1}, domain=CONTRIB)
        elif quantization == "none":
            inputs = [x, decoder.add_weight(f"{name}.T", dense.transposed())]
            product = ir.node("MatMul", inputs)
        else:
            product = _quantized_product(decoder, x, name, dense, BITS[quantization])
        nodes = [product]
        if node.op_type == "Head":
            head_weights += [name_of(value) for value in [*product.inputs[1:], *bias] if value is not None]
        if bias and bias[0] is not None:
            nodes.append(ir.node("Add", [product.outputs[0], bias[0]]))
        decoder.replace(node, nodes, nodes[-1].outputs)
    return head_weights


def _is_shared(decoder: DecoderGraph, product: ir.Node) -> bool:
    """Returns whether another node reads a product's float32 weight [out, in] as well, as with a tied embedding."""
    weight = product.inputs[1]
    assert weight is not None
    is_float32 = decoder.dtype is torch.float32
    return is_float32 and "transposed" not in product.attributes and len(weight.uses()) > 1


def quantized_parts(dense: Weight, bits: int, block: int) -> dict[str, Weight]:
    """Returns the parts of a weight as `Blocks` describes them: quantized, scales and zero_points.

    They are computed when they are written, so that graphs that share this weight compute nothing.

    Args:
        dense: The weight, [out, in], or several such, [n, out, in], which count as n·out rows.
        bits: 4 or 8.
        block: The inputs of a block.
    """
    rows, count = math.prod(dense.shape[:-1]), -(-dense.shape[-1] // block)

    def compute() -> tuple[Tensor, ...]:
        blocks = quantize_blocks(dense.stored(), bits, dense.moments if bits == 4 else None, block, dense.dtype)
        return blocks.packed, blocks.scales, blocks.zero_points

    parts = Parts(compute)
    return {
        "quantized": Weight((rows, count, block * bits // 8), torch.uint8, lambda: parts.take(0)),
        "scales": Weight((rows, count), dense.dtype, lambda: parts.take(1)),
        "zero_points": Weight((rows, -(-count * bits // 8)), torch.uint8, lambda: parts.take(2)),
    }


def _quantized_product(decoder: DecoderGraph, x: ir.Value, name: str, dense: Weight, bits: int) -> ir.Node:
    block = block_size(bits, dense.shape[1])
    parts = quantized_parts(dense, bits, block)
    inputs = [decoder.add_weight(f"{name}.{part}", weight) for part, weight in parts.items()]
    options = {"K": dense.shape[1], "N": dense.shape[0], "bits": bits, "block_size": block, "accuracy_level": 4}
    return ir.node("MatMulNBits", [x, *inputs], options, domain=CONTRIB)
